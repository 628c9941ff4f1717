"""The coefficient from somebody else's chains: exact draws, biased chains, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi

NBETA, GAMMA = 200.0, 2.0
SCALES = np.array([1.0, 3.0, 0.1, 0.5, 10.0])
LLC = 0.5 * np.sum(NBETA * SCALES / (NBETA * SCALES + GAMMA))


def loss(w):
    return 0.3 + 0.5 * jnp.sum(jnp.asarray(SCALES) * w**2)


def run(draws, **options):
    flat = draws.reshape(-1, 5)
    losses = 0.3 + 0.5 * (flat**2 @ SCALES)
    gradients = flat * SCALES
    options = {"nbeta": NBETA, "localization": GAMMA, "center": np.zeros(5), "init_loss": 0.3} | options
    return fastvi.virial_llc(draws, gradients.reshape(draws.shape), losses.reshape(draws.shape[:-1]), **options)


def exact(seed, chains=4, draws=250):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(chains, draws, 5)) / np.sqrt(NBETA * SCALES + GAMMA)


def test_errors_are_honest_and_the_columns_help():
    found = [run(exact(seed)) for seed in range(60)]
    z = np.array([(one.llc - LLC) / one.llc_sem for one in found])
    assert np.mean(np.abs(z) < 3) >= 0.95
    plain = np.std([one.plain - LLC for one in found])
    adjusted = np.std([one.llc - LLC for one in found])
    assert adjusted < 0.25 * plain
    assert np.median([one.variance_reduction for one in found]) > 15
    assert all(one.is_consistent for one in found)


def test_a_single_chain_and_pytrees_give_the_same_kind_of_answer():
    draws = exact(3, chains=1, draws=1000)
    found = run(draws[0])
    assert abs(found.llc - LLC) < 4 * found.llc_sem
    assert found.llc_sem < 0.5 * found.plain_sem
    split = {"a": draws[..., :2], "b": draws[..., 2:].reshape(1, 1000, 3, 1)}
    slopes = {"a": split["a"] * SCALES[:2], "b": split["b"] * SCALES[2:, None]}
    losses = 0.3 + 0.5 * (draws**2 @ SCALES)
    center = {"a": np.zeros(2), "b": np.zeros((3, 1))}
    as_tree = fastvi.virial_llc(split, slopes, losses, nbeta=NBETA, localization=GAMMA, center=center, init_loss=0.3)
    assert abs(as_tree.llc - LLC) < 4 * as_tree.llc_sem
    assert as_tree.plain == pytest.approx(found.plain, rel=1e-12)


def test_langevin_with_long_steps_is_flagged():
    """Unadjusted Langevin dynamics widens a direction of precision p by 1 / (1 - step p / 4)."""

    def chain(key, step):
        precision = jnp.asarray(NBETA * SCALES + GAMMA)

        def move(w, key):
            w = w - 0.5 * step * precision * w + jnp.sqrt(step) * jax.random.normal(key, w.shape)
            return w, w

        return jax.lax.scan(move, jnp.zeros(5), jax.random.split(key, 20_000))[1]

    keys = jax.random.split(jax.random.key(0), 8)
    draws = np.asarray(jax.vmap(chain, in_axes=(0, None))(keys, 1e-3), float)
    found = run(draws, discard=1000)
    assert not found.is_consistent
    assert "do not sample this posterior" in found.summary()
    assert abs(found.llc - LLC) < 0.2 * abs(found.plain - LLC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"center": np.zeros(4)}, "same structure"),
        ({"discard": 249}, "fewer than 4"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(fastvi.DataError, match=message):
        run(exact(0), **change)


def test_diverged_draws_are_refused():
    draws = exact(0)
    draws[1, 3, 2] = np.nan
    with pytest.raises(fastvi.DataError, match="not finite"):
        run(draws)
