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
    options = {
        "nbeta": NBETA,
        "localization": GAMMA,
        "center": np.zeros(5),
        "init_loss": 0.3,
    } | options
    return fastvi.virial_llc(
        draws, gradients.reshape(draws.shape), losses.reshape(draws.shape[:-1]), **options
    )


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
    as_tree = fastvi.virial_llc(
        split, slopes, losses, nbeta=NBETA, localization=GAMMA, center=center, init_loss=0.3
    )
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


def test_the_chains_of_another_posterior_are_told():
    """The center, nbeta and localization are each seen, in a tree of two blocks as in one."""
    draws = exact(7)
    assert run(draws).is_consistent
    for change in (
        {"center": np.full(5, 0.5)},
        {"nbeta": 1.3 * NBETA},
        {"nbeta": NBETA / 1.3},
        {"localization": 40 * GAMMA},
    ):
        found = run(draws, **change)
        assert not found.is_consistent, change
        assert "check center" in found.summary()


def test_a_wrong_center_does_not_cancel():
    """Along a direction that the localizer alone holds, two columns are off in opposite ways."""
    shift = np.full(2, 3.0)
    draws = np.random.default_rng(0).normal(size=(4, 500, 2)) / np.sqrt(GAMMA)
    losses = np.full(draws.shape[:2], 0.3)
    options = {"nbeta": NBETA, "localization": GAMMA, "init_loss": 0.3}
    right = fastvi.virial_llc(draws, 0 * draws, losses, center=np.zeros(2), **options)
    wrong = fastvi.virial_llc(draws, 0 * draws, losses, center=shift, **options)
    assert right.is_consistent
    assert abs(wrong.virial_z) > 20


def test_exact_draws_in_many_dimensions_are_consistent():
    """The slope along a mean has mean zero only where the draw has no part in the mean."""
    rng = np.random.default_rng(2)
    for chains, draws in ((4, 100), (1, 400)):
        samples = rng.normal(size=(chains, draws, 300)) / np.sqrt(NBETA + GAMMA)
        losses = 0.5 * np.sum(samples**2, axis=-1)
        options = {"nbeta": NBETA, "localization": GAMMA, "center": np.zeros(300), "init_loss": 0.0}
        found = fastvi.virial_llc(samples, samples, losses, **options)
        assert abs(found.virial_z) < 4
        assert found.is_consistent
        assert found.llc == pytest.approx(150 * NBETA / (NBETA + GAMMA), abs=4 * found.llc_sem)


def test_stuck_chains_are_not_consistent():
    draws = exact(5)
    draws[2] = draws[2, 17]
    assert not run(draws).is_consistent
    frozen = np.repeat(exact(5)[:, :1], 250, axis=1)
    found = run(frozen)
    assert found.rhat == np.inf
    assert not found.is_consistent
    assert "do not agree" in found.summary()


def swapped(draws, losses_too=False):
    losses = 0.3 + 0.5 * (draws**2 @ SCALES)
    gradients = draws * SCALES
    if losses_too:
        losses = losses.T
    options = {"nbeta": NBETA, "localization": GAMMA, "center": np.zeros(5), "init_loss": 0.3}
    return fastvi.virial_llc(draws.swapaxes(0, 1), gradients.swapaxes(0, 1), losses, **options)


def test_swapped_axes_are_refused():
    with pytest.raises(
        fastvi.DataError, match=r"samples must have shape \(4, 250, 5\).*got \(250, 4, 5\)"
    ):
        swapped(exact(0))
    rng, draws = np.random.default_rng(1), [exact(1, 8, 1)[:, 0]]
    for _ in range(199):  # an autoregressive chain of the same law
        draws.append(0.9 * draws[-1] + np.sqrt(1 - 0.81) * exact(rng.integers(2**31), 8, 1)[:, 0])
    with pytest.raises(fastvi.DataError, match="Swap the axes"):
        swapped(np.stack(draws, axis=1), losses_too=True)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"nbeta": 0.0}, fastvi.ConfigError, "nbeta must be a number > 0"),
        ({"nbeta": -3.0}, fastvi.ConfigError, "nbeta"),
        ({"nbeta": np.nan}, fastvi.ConfigError, "nbeta"),
        ({"localization": -1.0}, fastvi.ConfigError, "localization must be a number >= 0"),
        ({"init_loss": np.nan}, fastvi.ConfigError, "init_loss must be a finite number"),
        ({"init_loss": "0.3"}, fastvi.ConfigError, "init_loss must be a finite number"),
        ({"discard": -5}, fastvi.ConfigError, "discard must be an integer >= 0"),
        ({"discard": 2.5}, fastvi.ConfigError, "discard must be an integer >= 0"),
        ({"discard": 250}, fastvi.DataError, "250 draws less 250"),
        ({"center": np.full(5, np.nan)}, fastvi.DataError, "center are not finite"),
        ({"center": {"w": np.zeros(5)}}, fastvi.DataError, "same structure"),
        ({"center": 0.0}, fastvi.DataError, "samples must have shape"),
    ],
)
def test_impossible_arguments(change, kind, message):
    with pytest.raises(kind, match=message):
        run(exact(0), **change)


@pytest.mark.parametrize(
    ("samples", "losses", "message"),
    [
        (
            lambda x: x.astype(int),
            lambda v: v,
            "samples must be floating-point numbers; got dtype int64",
        ),
        (
            lambda x: x + 0j,
            lambda v: v,
            "samples must be floating-point numbers; got dtype complex128",
        ),
        (lambda x: x, lambda v: v > 0, "losses must be floating-point numbers; got dtype bool"),
        (lambda x: x, lambda v: v.astype(np.float16), "losses have dtype float16, too coarse"),
        (lambda x: x, lambda v: v[..., None], r"losses must have shape \(chains, draws\)"),
    ],
)
def test_dtypes_that_cannot_be_draws(samples, losses, message):
    draws = exact(0)
    options = {"nbeta": NBETA, "localization": GAMMA, "center": np.zeros(5), "init_loss": 0.3}
    with pytest.raises(fastvi.DataError, match=message):
        fastvi.virial_llc(
            samples(draws), draws * SCALES, losses(0.3 + 0.5 * (draws**2 @ SCALES)), **options
        )
