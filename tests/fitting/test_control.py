"""What keeps a fit in hand: pruning, annealing, ridges, whitening."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import quick_jit

from fastvi import estimate_llc
from fastvi.families.base import TargetValues
from fastvi.fitting.pruning import kept_components, prune
from fastvi.fitting.step import StepSettings, init_state
from fastvi.fitting.step_plan import MOST_COMPONENTS, ScheduleSettings, annealing
from fastvi.kernels import triangular
from tests.support.mixtures import assert_tree_close, make

DATA = (jnp.zeros((10, 1)),)


def bowl(w, batch):
    return 0.5 * jnp.sum(jnp.arange(1.0, 5.0) * w**2) + 0.0 * jnp.sum(batch[0])


def fit_bowl(**options):
    """Fit a quadratic; its best Gaussian has llc = 1/2 sum_i nbeta h_i / (nbeta h_i + gamma)."""
    settings = {
        "num_chains": 2,
        "progress": False,
        "nbeta": 3.0,
        "early_stop": False,
        "samples_per_step": 8,
    }
    settings["method"] = "variational"
    return estimate_llc(bowl, jnp.zeros(4), DATA, **settings | options)


BOWL_LLC = 0.5 * sum(3.0 * h / (3.0 * h + 1) for h in range(1, 5))


KEPT = quick_jit(kept_components)


@pytest.mark.parametrize(
    ("weights", "threshold", "cap", "kept"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.1, None, [1, 1, 1, 0]),
        ([0.5, 0.3, 0.15, 0.05], None, 2, [1, 1, 0, 0]),
        ([0.05, 0.3, 0.15, 0.5], 0.3, 3, [0, 1, 0, 1]),  # 0.3 / 0.8 once the light ones are gone
        ([0.05, 0.3, 0.15, 0.5], 0.99, None, [0, 0, 0, 1]),
        (
            [1 / 6] * 6,
            0.2,
            None,
            [1, 1, 1, 1, 1, 0],
        ),  # the last of equals goes, the others then have 1/5 each
        ([0.0, 0.6, 0.4, 0.0], None, 3, [0, 1, 1, 0]),  # the dead stay dead
        ([0.2, 0.8], None, 1, [0, 1]),
    ],
)
def test_the_lightest_components_go_first(weights, threshold, cap, kept):
    keep = KEPT(np.float32(weights), threshold or 0.0, cap or MOST_COMPONENTS)
    np.testing.assert_array_equal(keep, np.asarray(kept, bool))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("means", ["shared", "component"])
def test_a_pruned_mixture_is_that_of_the_others(means):
    family, params = make(means, ranks=(2, 2, 2), prunes=True)
    params = params._replace(logits=jnp.log(jnp.asarray([0.6, 0.1, 0.3])))
    pruned = jax.jit(lambda p: prune(family, p, (), None, 0.2, MOST_COMPONENTS)[0])(params)
    np.testing.assert_allclose(jnp.exp(family.log_weights(pruned)), [2 / 3, 0, 1 / 3], rtol=1e-12)
    rest, _ = make(means, ranks=(2, 2), prunes=True)
    kept = params._replace(
        logits=params.logits[jnp.array([0, 2])],
        offsets=params.offsets[jnp.array([0, 2])] if means == "component" else params.offsets,
        factors=params.factors[jnp.array([0, 2])],
    )
    draws = jax.jit(lambda p: family.sample(p, jax.random.key(0), 100, antithetic=False))(pruned)
    assert set(np.unique(draws.record.noise.label)) == {0, 2}
    expected = jax.jit(jax.vmap(lambda v: rest.log_prob(kept, v)))(draws.displacement)
    np.testing.assert_allclose(draws.log_prob, expected, rtol=1e-9)
    responsibilities = draws.record.drawn.responsibilities[:, jnp.array([0, 2])]
    drawn = draws.record.drawn._replace(responsibilities=responsibilities)
    others = draws._replace(record=draws.record._replace(drawn=drawn))
    statistics = jax.jit(lambda *given: rest.step_statistics(*given))(kept, others)
    for name, value in jax.jit(lambda *given: family.step_statistics(*given))(
        pruned, draws
    ).items():
        np.testing.assert_allclose(value, statistics[name], rtol=1e-9, err_msg=name)


def test_no_draw_has_the_label_of_a_pruned_component():
    family, params = make(ranks=(1,) * 4, prunes=True)
    params = params._replace(logits=jnp.asarray([-jnp.inf, 0.3, 0.1, -jnp.inf]))

    @quick_jit
    def labels(params):
        noise = family.draw_noise(jax.random.key(0), 3)
        quantiles = jnp.asarray([0.0, 0.5, 1 - 2**-24], noise.quantile.dtype)
        return family._noise(family.mixture(params), noise._replace(quantile=quantiles)).label

    np.testing.assert_array_equal(labels(params), [1, 1, 2])


def test_a_pruned_component_is_forgotten_by_the_optimiser():
    family, params = make("component", ranks=(2, 2, 2), prunes=True)
    state = jax.jit(lambda p: init_state(family, p, StepSettings(prunes=True)))(params)
    marked = jax.tree_util.tree_map(lambda leaf: np.full_like(leaf, 7.0), state.opt_state)
    params = params._replace(logits=jnp.asarray(np.log([0.5, 0.2, 0.3])))
    per_component = family.update_rules(params, 1).per_component
    _, cleared = quick_jit(lambda *given: prune(family, *given, per_component, 0.0, 2))(
        params, marked
    )
    moments, before = cleared[1], marked[1]
    for got, was, initial in (
        (moments.mean.logits, before.mean.logits, 0.0),
        (moments.mean.offsets, before.mean.offsets, 0.0),
        (moments.square.factors, before.square.factors, 0.0),
        (moments.block_unseen.factors, before.block_unseen.factors, 1.0),
    ):
        assert was.shape[0] == 3
        was[1] = initial
        np.testing.assert_array_equal(got, was)
    assert_tree_close(
        moments.square._replace(logits=0, offsets=0, factors=0),
        before.square._replace(logits=0, offsets=0, factors=0),
        0,
    )
    np.testing.assert_array_equal(cleared[0].mean_square, 7.0)


def test_a_start_is_calibrated_beyond_the_end_of_a_short_fit():
    # the steps of a round outnumber those of the fit; second moments that never began made NaN of
    # steps that change nothing, and of q a point
    result = fit_bowl(num_chains=1, steps=10, samples_per_step=1)
    assert np.all(np.isfinite(result.traces["virial"]))
    assert abs(result.llc - BOWL_LLC) < 4 * np.hypot(result.llc_sem, 0.02 * BOWL_LLC)


def test_pruning_in_a_fit_only_ever_removes():
    result = fit_bowl(M=6, r=1, prune_threshold=0.2, steps=400, eval_every=20)
    effective = result.traces["effective_M"]
    assert np.all(np.diff(effective, axis=1) <= 0)
    assert np.all(effective >= 1)
    assert np.all(effective[:, :19] == 6)
    assert np.all(effective[:, -1] < 6)
    weights = result.family_arrays["pi"]
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal((weights > 0).sum(axis=1), effective[:, -1])
    np.testing.assert_allclose(
        result.traces["pi_min"][:, -1], np.where(weights > 0, weights, 1).min(axis=1), rtol=1e-6
    )
    assert abs(result.llc - BOWL_LLC) < max(4 * result.llc_sem, 0.02 * BOWL_LLC)


def test_a_dirichlet_prior_keeps_the_weights_apart_from_zero():
    """Components of a crossing differ.

    Some lie along its arms. Without the prior the others die out.
    """

    def entropy(prior):
        result = estimate_llc(
            lambda w, batch: (w[0] * w[1]) ** 2 + 0.0 * jnp.sum(batch[0]),
            jnp.zeros(2),
            DATA,
            nbeta=100.0,
            progress=False,
            early_stop=False,
            method="variational",
            M=4,
            r=1,
            steps=400,
            lr=0.05,
            samples_per_step=8,
            alpha_dirichlet_prior=prior,
        )
        return result.traces["pi_entropy"][:, -50:].mean()

    plain, spread = entropy(None), entropy(2.0)
    assert plain < spread - 0.05
    assert spread == pytest.approx(np.log(4), abs=0.05)


def test_temperature_and_bonus_end_when_told():
    schedule = ScheduleSettings(
        steps=100,
        temperature=2.0,
        temperature_fraction=0.4,
        entropy_bonus=0.5,
        entropy_bonus_steps=30,
    )
    assert schedule.anneal_until == 40
    temperatures, bonuses = annealing(schedule, np.array([0, 10, 29, 30, 40, 99]))
    np.testing.assert_allclose(temperatures, [2, 1.75, 1.275, 1.25, 1, 1])
    np.testing.assert_allclose(bonuses, [0.5, 0.5, 0.5, 0, 0, 0])
    assert ScheduleSettings(temperature=2.0, entropy_bonus=0.5).anneal_until == 0
    assert ScheduleSettings(temperature_fraction=0.5, entropy_bonus_steps=3).anneal_until == 0


@pytest.mark.usefixtures("x64")
def test_the_current_temperature_and_bonus_replace_the_constant_ones():
    constant, params = make(temperature=1.7, entropy_bonus=0.3, dirichlet=1.4)
    family, _ = make(dirichlet=1.4)
    family = family.annealed(jnp.asarray(1.7), jnp.asarray(0.3))
    pulled = []
    for member in (constant, family):

        @jax.jit
        def pull(member, params):
            draws = member.sample(params, jax.random.key(0), 4, antithetic=True)
            value = -jnp.sum(draws.displacement**2, -1)
            return member.pullback(
                params, draws, TargetValues(value, -2 * draws.displacement), groups=2
            )

        pulled.append(pull(member, params))
    assert_tree_close(pulled[1], pulled[0], 1e-12)


def test_an_entropy_bonus_widens_q_until_it_ends():
    """The best Gaussian of E[ell] - (1 + b) E[log q] is 1 + b times as wide; so is its llc."""
    options = {"M": 1, "r": 0, "steps": 600, "entropy_bonus": 0.5}
    widened = fit_bowl(**options)
    assert widened.llc == pytest.approx(1.5 * BOWL_LLC, rel=0.03)
    assert fit_bowl(**options, entropy_bonus_steps=150).llc == pytest.approx(BOWL_LLC, rel=0.03)


def test_a_ridge_rescues_what_rounding_made_indefinite():
    """Parallel rows of length 1e6: float32 sees I + G as indefinite, float64 does not."""
    row = np.linspace(0.5, 1.0, 3)
    gram = np.outer(row, row) * 1e12
    well = np.eye(3) * 2.0
    inverse_root = quick_jit(triangular.inverse_root)
    found = quick_jit(jax.vmap(triangular.inverse_root))(np.float32([[gram, well], [well, well]]))
    found = jax.device_get(found)
    np.testing.assert_array_equal(found.ridged, [[1, 0], [0, 0]])
    for root, matrix in zip(found.root.reshape(4, 3, 3), (gram, well, well, well), strict=True):
        ridge = triangular.RIDGE if matrix is gram else 0.0
        exact = np.linalg.inv(np.eye(3) + matrix + ridge * np.diag(np.diag(np.eye(3) + matrix)))
        np.testing.assert_allclose(root.T @ root, exact, rtol=0, atol=0.02 * np.abs(exact).max())
    single = inverse_root(np.float32(gram))
    np.testing.assert_allclose(single.root, found.root[0, 0], rtol=0.02, atol=1e-9)
    assert single.ridged == 1


def test_a_nan_is_not_rescued():
    spoiled = quick_jit(triangular.inverse_root)(np.full((2, 2), np.nan, np.float32))
    assert np.isnan(spoiled.root).any()
    assert spoiled.ridged == 0


def test_ridges_are_counted_draw_by_draw():
    family, params = make(ranks=(2, 2))
    family, params = jax.tree_util.tree_map(
        lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf, (family, params)
    )
    parallel = (
        params.factors.at[0, 1].set(params.factors[0, 0]) * jnp.asarray([1e6, 1.0])[:, None, None]
    )

    @jax.jit
    def sample(params):
        draws = family.sample(params, jax.random.key(0), 2, antithetic=True)
        return draws.log_prob, family.step_statistics(params, draws)["cholesky_ridge"]

    log_prob, ridged = sample(params._replace(factors=parallel))
    assert np.all(np.isfinite(log_prob))
    assert ridged == 1
    assert sample(params)[1] == 0


@pytest.fixture(scope="module")
def anisotropic():
    """A tanh network whose inputs differ in scale by 30, trained to a minimum."""
    rng = np.random.default_rng(0)
    scales = np.array([10.0, 3.0, 1.0, 0.3])
    inputs = rng.normal(size=(400, 4)) * scales
    targets = np.tanh(inputs @ rng.normal(size=(4, 3)) / 3.6) @ rng.normal(
        size=3
    ) + 0.1 * rng.normal(size=400)
    data = (jnp.asarray(inputs, jnp.float32), jnp.asarray(targets, jnp.float32))

    def loss(params, batch):
        hidden = jnp.tanh(batch[0] @ params["w1"] + params["b1"])
        return 0.5 * jnp.mean((hidden @ params["w2"] + params["b2"] - batch[1]) ** 2)

    start = {
        "w1": rng.normal(size=(4, 4)) / scales[:, None] / 2,
        "b1": np.zeros(4),
        "w2": rng.normal(size=4),
        "b2": 0.0,
    }
    start = jax.tree_util.tree_map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 20_000))

    @jax.jit
    def train(params):
        def step(carry, _):
            updates, state = optimizer.update(jax.grad(loss)(carry[0], data), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=20_000)[0][0]

    return loss, train(start), data


def test_whitening_smooths_the_fit_of_an_anisotropic_network(anisotropic):
    """The seeds' family, centred, without a core: scales of the parameters matter most to it."""
    seeds_family = {"curvature_rank": 0, "means": "center", "M": 4}
    options = {
        "steps": 600,
        "batch_size": 64,
        "samples_per_step": 1,
        "early_stop": False,
        "num_chains": 16,
    }
    options["method"] = "variational"
    jumps, last, ends = {}, {}, {}
    for mode in ("none", "rmsprop"):
        result = estimate_llc(
            *anisotropic, key=5, progress=False, whitening_mode=mode, **seeds_family, **options
        )
        elbo = result.traces["elbo"]
        assert np.all(np.isfinite(elbo))
        jumps[mode] = np.percentile(np.abs(np.diff(elbo, axis=1)), 95)
        last[mode] = elbo[:, -100:].mean()
        ends[mode] = result.elbo
    assert jumps["rmsprop"] < 0.97 * jumps["none"]
    assert last["rmsprop"] > last["none"]
    assert ends["rmsprop"] > ends["none"]
