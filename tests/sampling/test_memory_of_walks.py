"""The memory of a walk from the localizer in many dimensions, in floats for each parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi._errors import ConfigError
from fastvi.sampling.from_localizer import measure, memory, setup, walk

INPUTS, HIDDEN, CLASSES, COUNT = 16, 20_500, 10, 64
DIM = HIDDEN * (INPUTS + CLASSES)
STATE = 3 * 8  # position, momentum and gradient of each walker
MOST_HELD = 32  # of 36: the compiler, allocators and copies on the host take the rest


def loss_fn(weights, batch):
    logits = jnp.tanh(batch[0] @ weights[0]) @ weights[1]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=-1)
    return -jnp.mean(chosen)


def held():
    """Return the numbers on the device, each buffer once, over the parameters."""
    arrays = {one.unsafe_buffer_pointer(): one for one in jax.live_arrays() if one.nbytes >= DIM}
    return sum(one.nbytes for one in arrays.values()) / 4 / DIM


def test_a_walk_holds_one_state_and_few_vectors(monkeypatch):
    """What is held at each round, with the temporaries of its program."""
    rng = np.random.default_rng(0)
    weights = [
        rng.normal(size=size).astype(np.float32) / 4
        for size in ((INPUTS, HIDDEN), (HIDDEN, CLASSES))
    ]
    inputs = rng.normal(size=(COUNT, INPUTS)).astype(np.float32)
    data = inputs, rng.integers(0, CLASSES, COUNT).astype(np.int32)
    before, rounds = held(), []

    def watched(given, course, *rest):
        advance, found = given.programs.advance, []

        def lowered(*arguments):
            found.append(advance.lower(*arguments))
            return advance(*arguments)

        live = held() - before
        if not rounds:
            given = dataclasses.replace(given, programs=given.programs._replace(advance=lowered))
        after = setup.call_round(given, course, *rest)
        rounds.append((live, *(one.compile().memory_analysis() for one in found)))
        return after

    for module in (measure, walk):
        monkeypatch.setattr(module, "call_round", watched)
    options = {
        "nbeta": 10.0,
        "localization": 100.0,
        "sampler": {"gradients": "fresh"},
        "budget": 800,
    }
    fastvi.estimate_llc(loss_fn, weights, data, key=0, throw=False, progress=False, **options)
    memory = rounds[0][1]
    assert memory.alias_size_in_bytes / 4 / DIM == pytest.approx(STATE, abs=0.01)
    assert len(rounds) > 5  # measurements and steps
    assert max(live for live, *_ in rounds) + memory.temp_size_in_bytes / 4 / DIM < MOST_HELD


def test_a_walk_larger_than_the_device_is_refused(monkeypatch):
    posterior = {"w": np.zeros(600_000, np.float32)}
    # eight walkers: 24 numbers of theirs and 15 beside, of four bytes
    assert memory.walk_bytes(600_000, 8, 4) == 39 * 4 * 600_000
    monkeypatch.setattr(memory, "memory_limit", lambda: 80_000_000)
    data = np.zeros((16, 1), np.float32)
    with pytest.raises(ConfigError, match=r"8 walkers in 600,000 dimensions takes 0.1 GiB"):
        fastvi.estimate_llc(
            lambda params, batch: jnp.sum(params["w"] ** 2) + jnp.mean(batch),
            posterior,
            data,
            sampler={"start": "localizer"},
            progress=False,
        )
