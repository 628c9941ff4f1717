"""Walks that are interrupted go on to the bits of walks that were not."""

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.results import resume

COUNT, DIM = 512, 8
X = np.random.default_rng(1).normal(size=(COUNT, DIM)).astype(np.float32)


def loss_fn(w, batch):
    return 0.5 * jnp.mean((batch @ w) ** 2) + 0.01 * jnp.mean((batch @ w) ** 4)


class Interrupted(BaseException):
    """Passes through everything, as a kill does."""


def estimate(gradients, folder=None, data=X, **options):
    given = {"nbeta": 40.0, "localization": 10.0, "error": 0.05, "progress": False}
    sampler = {"gradients": gradients, **options.pop("sampler", {})}
    return fastvi.estimate_llc(
        loss_fn, jnp.zeros(DIM), data, resume_from=folder, sampler=sampler, **given | options
    )


def assert_same_bits(result, whole):
    for name in ("llc", "llc_sem", "error_parts", "work", "correction", "health", "elbo"):
        assert getattr(result, name) == getattr(whole, name), name
    for name in ("walk_llc", "llc_per_chain", "llc_sem_per_chain", "log_weights"):
        np.testing.assert_array_equal(getattr(result, name), getattr(whole, name), name)


@pytest.fixture
def at_every_save(monkeypatch):
    """Interrupt behind each checkpoint in turn; return how many there were."""
    monkeypatch.setattr(resume, "SAVING_SHARE", 1e9)
    save = resume.StageFile.save

    def goes_on(make):
        """Run until it ends, each time from the checkpoint that the last one came to."""
        stages = []

        def interrupt(self, content, is_last):
            save(self, content, is_last)
            stages.append((self.stage, is_last))
            if not is_last:
                raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(resume.StageFile, "save", interrupt)
            while True:
                try:
                    return make(), stages
                except Interrupted:
                    pass

    return goes_on


@pytest.mark.parametrize("gradients", ["blocks", "full", "fresh", "anchored"])
def test_interrupted_at_every_round(gradients, at_every_save, tmp_path):
    whole = estimate(gradients)
    result, stages = at_every_save(lambda: estimate(gradients, tmp_path))
    print(len(stages), stages, whole.correction)
    assert_same_bits(result, whole)
