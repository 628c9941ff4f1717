"""Walks from the localizer against closed forms and dense linear algebra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov

import fastvi
from fastvi._compilation import PROGRAMS
from fastvi.api.walk import chooses_walk
from fastvi.sampling.from_localizer import steps as compiled_steps
from fastvi.sampling.from_localizer.batches import DrawnReader, FeedReader
from fastvi.sampling.from_localizer.measure import (
    MOST_LOOKS,
    inner_products,
    leaf_curvature,
    mean_square_gradient,
    measure_curvature,
    measure_heat,
)
from fastvi.sampling.from_localizer.plan import (
    SEEN_SHARE,
    heat_share,
    noise_heat,
    plan_parts,
    plan_step,
    position_heat,
    seen_heat,
)
from fastvi.sampling.from_localizer.setup import FRICTION_TIME, Course, WalkSetup
from fastvi.sampling.from_localizer.steps import (
    RoundInputs,
    blank_state,
    evaluate_minibatches,
    fill,
    minibatch_programs,
)
from fastvi.sampling.from_localizer.walk import (
    HOPELESS_SHARE,
    MOST_STIFFNESS,
    MOST_UNFILLED,
    TooStiff,
    excess_width,
    missing_width,
    walk_from_localizer,
)
from fastvi.sampling.settings import SamplerSettings
from fastvi.target.checks import LossLook
from fastvi.target.data import Problem, hold
from fastvi.target.feed import Feed
from fastvi.target.fingerprint import fingerprint_loss
from fastvi.target.posterior import LocalPosterior
from fastvi.target.ravel import ravel_loss

SIZES, CURVATURES = (60, 4), (0.5, 8.0)
HESSIAN = np.repeat(CURVATURES, SIZES)
DIM, COUNT, WALKERS, PART = 64, 4096, 8, 4
NBETA, GAMMA = 10.0, 20.0
SPREAD = 0.3  # of the examples about w*
POINTS = SPREAD * np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32)
POINTS -= POINTS.mean(axis=0)
PARAMS = {"a": jnp.zeros(SIZES[0]), "b": jnp.zeros(SIZES[1])}
PRECISION = NBETA * HESSIAN + GAMMA
EXACT = 0.5 * np.sum(NBETA * HESSIAN / PRECISION)


def loss_fn(w, batch):
    flat = jnp.concatenate([w["a"], w["b"]])
    return 0.5 * jnp.mean(jnp.sum(HESSIAN.astype(np.float32) * (flat - batch) ** 2, axis=-1))


@functools.cache
def flat_loss():
    """Return the loss and w*, held by this module: programs only borrow the loss."""
    return ravel_loss(loss_fn, PARAMS, jnp.float32)


def product_loss(w, batch):
    """Return a loss whose width is a cross: each of two weights is free where the other is 0."""
    del batch
    return 0.5 * jnp.sum((w["a"] * w["b"]) ** 2)


@functools.cache
def flat_product():
    return ravel_loss(product_loss, {name: jnp.zeros(DIM // 2) for name in "ab"}, jnp.float32)


def make_setup(
    key=0,
    *,
    error=0.02,
    budget=1e5,
    must_walk=True,
    nbeta=NBETA,
    reader=None,
    flat=flat_loss,
    gamma=GAMMA,
):
    objective, center = flat()
    posterior = LocalPosterior(center, jnp.float32(nbeta), jnp.float32(gamma))
    examples = jnp.asarray(POINTS)
    loss = fingerprint_loss(objective, Problem(posterior, hold(examples), 64))
    reader = reader or DrawnReader(examples, PART)
    return WalkSetup(
        programs=minibatch_programs(objective, loss, posterior, reader.first, 16),
        posterior=posterior,
        leaf_sizes=tuple(objective.structure.leaf_sizes),
        reader=reader,
        keys=jax.random.split(jax.random.key(key), WALKERS),
        seed=np.random.SeedSequence(key),
        settings=SamplerSettings(),
        error=error,
        budget=budget,
        must_walk=must_walk,
        report=lambda work, llc, sem: None,
        num_data=COUNT,
    )


def exact_scale():
    return jnp.asarray(1 / np.sqrt(PRECISION), jnp.float32)


def at_center():
    return blank_state((WALKERS, DIM), np.dtype(np.float32))


@pytest.mark.parametrize("step", [0.1, 0.3])
@pytest.mark.parametrize("curvature", [0.5, 1.0, 14.0])
def test_heat_is_that_of_the_linear_recursion(step, curvature):
    kept = np.exp(-step / FRICTION_TIME)
    kick = np.array([[1, 0], [-step * curvature, 1]])
    drift = np.array([[1, step / 2], [0, 1]])
    friction = np.diag([1, kept])
    once = drift @ friction @ drift
    noise = once @ np.array([[0], [step]])
    added = solve_discrete_lyapunov(once @ kick, noise @ noise.T)[0, 0]
    heat = position_heat(step, FRICTION_TIME, np.array([curvature]))[0]
    assert heat == pytest.approx(added * curvature, rel=0.02)


def test_curvature_of_each_array_is_measured():
    setup = make_setup()
    rng = np.random.default_rng(1)
    measured, _, work, examples = measure_curvature(setup, at_center(), rng)
    np.testing.assert_allclose(measured.curvature, NBETA * np.array(CURVATURES), rtol=1e-4)
    # in the coordinates of the two curvatures the data's share of the precision is what is left
    # two products from noise along both curvatures leave (0.2 / 0.8)^4 of the other
    assert measured.stiffness == pytest.approx(np.max(NBETA * HESSIAN / PRECISION), rel=0.25**4 * 2)
    assert work == pytest.approx(5 * (4 / 3) * WALKERS * PART)
    assert examples == 2 * WALKERS * PART
    assert abs(measured.decrement) < 4 * measured.decrement_error


@pytest.mark.parametrize("nbeta", [1e4, 1e10])
def test_curvature_is_that_of_the_width_which_it_leaves(nbeta):
    """The mean curvature of nbeta (a b)^2 / 2 is nbeta times the variance of the other weight."""
    setup = make_setup(nbeta=nbeta, flat=flat_product, gamma=1.0)
    measured, _, work, _ = measure_curvature(setup, at_center(), np.random.default_rng(1))
    # over the localizer's width it is nbeta; its fixed point is that of c = nbeta / (1 + c)
    consistent = np.sqrt(nbeta)
    assert np.all(measured.curvature > consistent / 4)
    assert np.all(measured.curvature < consistent * 4)
    assert work <= (5 + MOST_LOOKS) * (4 / 3) * WALKERS * PART


def test_curvature_where_the_loss_is_not_finite_over_the_localizer():
    def blows_up(w, batch):
        return product_loss(w, batch) * jnp.where(jnp.sum(w["a"] ** 2) > 1e-2, jnp.inf, 1.0)

    flat = ravel_loss(blows_up, {name: jnp.zeros(DIM // 2) for name in "ab"}, jnp.float32)
    setup = make_setup(nbeta=1e4, flat=lambda: flat, gamma=1.0)
    measured, *_ = measure_curvature(setup, at_center(), np.random.default_rng(1))
    assert np.all(np.isfinite(measured.curvature))


def test_a_walk_that_does_not_fill_the_width_gives_way_to_a_fit():
    """Arms of a cross are a hundred times longer than wide, and its stiffness at w* is nothing."""
    settings = dict(nbeta=1e8, flat=flat_product, gamma=1.0, budget=4e4)
    given_up = walk_from_localizer(make_setup(must_walk=False, **settings))
    assert isinstance(given_up, TooStiff)
    assert given_up.stiffness < MOST_STIFFNESS
    assert HOPELESS_SHARE < given_up.work / settings["budget"] < 2 * HOPELESS_SHARE
    walk = walk_from_localizer(make_setup(**settings))
    assert walk.check.unmet
    assert walk.check.analysis.parts.relaxation > MOST_UNFILLED * walk.check.analysis.llc


def test_the_gradient_at_the_center_is_seen_through_its_noise():
    rng = np.random.default_rng(0)
    mean = 0.5 * np.ones(50)
    draws = mean + rng.normal(size=(300, 8, 50))
    values = [mean_square_gradient(inner_products([one])) for one in draws]
    squares, errors = np.array(values).T
    assert abs(squares.mean() - mean @ mean) < 4 * squares.std() / np.sqrt(300)
    assert errors.mean() == pytest.approx(squares.std(), rel=0.3)


def test_rayleigh_quotients_are_at_least_zero():
    direction = np.ones((2, 3))
    bent = np.array([[2.0, 2.0, -1.0]] * 2)
    np.testing.assert_allclose(
        leaf_curvature(zip(direction, bent, strict=True), (2, 1)), [2.0, 0.0]
    )


def test_heat_is_measured():
    heats = []
    for key in range(12):
        course = Course(at_center(), exact_scale(), 0.3)
        heats.append(measure_heat(make_setup(key), course).heat)
    variance = NBETA**2 * HESSIAN**2 * POINTS.var(axis=0) / PART / PRECISION
    share = NBETA * HESSIAN / PRECISION
    exact = 0.5 * np.sum(variance * share * position_heat(0.3, FRICTION_TIME, np.ones(DIM)))
    # noise has directions of both curvatures, of which their mean is taken
    assert np.mean(heats) == pytest.approx(exact, rel=0.15)


def test_a_walk_finds_the_llc():
    results = [walk_from_localizer(make_setup(key, error=0.03)) for key in range(6)]
    analyses = [walk.check.analysis for walk in results]
    scores = np.array([(one.llc - EXACT) / one.llc_sem for one in analyses])
    assert np.all(np.abs(scores) < 4)
    assert np.sqrt(np.mean(scores**2)) < 2
    assert all(one.llc_sem < 0.05 * EXACT for one in analyses)
    for walk in results:
        assert walk.reference_loss == pytest.approx(0.5 * np.mean(POINTS**2 @ HESSIAN), rel=0.05)


@pytest.mark.parametrize("budget", [200.0, 700.0, 3000.0])
def test_no_walk_exceeds_its_budget(budget):
    setup = make_setup(error=1e-4, budget=budget)
    if budget < 500:
        with pytest.raises(fastvi.ConfigError, match="budget"):
            walk_from_localizer(setup)
        return
    walk = walk_from_localizer(setup)
    assert 0.9 * budget < walk.work <= budget
    assert walk.check.unmet


def test_stiff_posteriors_are_left_to_a_fit():
    stiff = walk_from_localizer(make_setup(must_walk=False, nbeta=1e4))
    assert isinstance(stiff, TooStiff) or stiff.measured.stiffness <= 100


def test_steps_and_batches_are_planned():
    assert plan_step(0.0) == 0.3
    assert plan_step(120.0) == pytest.approx(0.1)
    assert plan_parts(1.0, 0.05, 100) == 4
    assert plan_parts(1.0, 0.05, 2) == 2
    assert plan_parts(-1.0, 0.05, 100) == 1


def test_the_losses_of_a_walk_say_how_noisy_its_batches_are():
    """White noise of a known variance over a llc that moves little from one step to the next."""
    rng, steps = np.random.default_rng(0), 4000
    slow = 5 + np.cumsum(0.03 * rng.normal(size=(steps, 8)), axis=0)
    seen, error = seen_heat(slow + 2.0 * rng.normal(size=(steps, 8)), 0.3, False)
    assert seen == pytest.approx(SEEN_SHARE * noise_heat(4.0, 0.3), rel=0.05)
    assert error < 0.05 * seen
    # without the slope at w*, the loss has half of the noise that the gradient has
    anchored, _ = seen_heat(slow + rng.normal(size=(steps, 8)), 0.3, True)
    assert anchored == pytest.approx(seen, rel=0.05)
    assert seen_heat(slow[:1], 0.3, False) == (0.0, 0.0)


def test_heat_that_was_missed_is_doubted():
    share, doubt = heat_share(0.1, 10.0)
    assert share == pytest.approx(0.065, rel=0.01)
    assert doubt == pytest.approx(0.02, rel=0.02)
    assert heat_share(0.1, 10.0, missed=0.1)[0] == share
    assert heat_share(0.1, 10.0, missed=0.1)[1] == pytest.approx(np.hypot(doubt, 0.065), rel=0.01)


def rare_examples(rare, weight, usual, dim=300, count=2000):
    """A quadratic of which a few examples have nearly all the curvature, and its Hessian."""
    inputs = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    weights = np.where(np.arange(count) < rare, weight, usual).astype(np.float32)

    def loss(w, batch):
        return 0.5 * jnp.mean(batch[1] * (batch[0] @ w) ** 2)

    return loss, jnp.zeros(dim), (inputs, weights), (inputs.T * weights) @ inputs / count


def walk_on_rare_examples(rare, weight, nbeta, key, budget=4e5):
    """The estimate by fresh minibatches, and the exact llc."""
    loss, center, data, hessian = rare_examples(rare, weight, 0.01)
    values = nbeta * np.linalg.eigvalsh(hessian.astype(float))
    result = fastvi.estimate_llc(
        loss,
        center,
        data,
        nbeta=nbeta,
        localization=100.0,
        key=key,
        budget=budget,
        error=0.03,
        sampler={"gradients": "fresh"},
        progress=False,
        throw=False,
    )
    return result, 0.5 * np.sum(values / (values + 100.0))


@pytest.mark.parametrize("key", [0, 3])
def test_batches_grow_with_the_noise_that_a_walk_sees(key):
    """The measurement before the walk read 512 examples, and few of the eight that heat."""
    result, exact = walk_on_rare_examples(8, 20.0, 20.0, key)
    assert abs(result.llc - exact) < 4 * result.llc_sem
    assert result.llc_sem < 0.25 * exact
    assert result.correction.batch >= 64


def test_examples_that_throw_walkers_out_are_told():
    """Steps on batches with one of four examples are taken back: two nats of llc are left out."""
    result, exact = walk_on_rare_examples(4, 100.0, 100.0, key=4, budget=1e5)
    assert result.llc < 0.6 * exact
    assert result.correction.returned > 0
    unmet = {one.criterion: one.value for one in result.correction.unmet}
    assert unmet["share of steps taken back"] > 1e-3
    found = {finding.name: finding for finding in result.health}
    assert "throws walkers out" in str(found["walk_unsettled"])


def test_a_batch_of_parts_is_their_mean():
    objective, posterior = flat_loss()[0], make_setup().posterior
    keys = jax.random.split(jax.random.key(3), 2)
    position = np.random.default_rng(0).normal(size=(2, DIM)).astype(np.float32)
    source = DrawnReader(jnp.asarray(POINTS), PART).first
    step, parts = jnp.int32(7), jnp.int32(3)
    inputs = RoundInputs(posterior, exact_scale(), source, None, keys, parts)
    found = evaluate_minibatches(objective, inputs, jnp.asarray(position), step)
    rows = np.concatenate(
        [source.rows(keys, step, jnp.int32(part), parts) for part in range(3)], axis=1
    )
    displacement = position / np.sqrt(PRECISION)
    for walker in range(2):
        batch, v = POINTS[rows[walker]], displacement[walker]
        losses = 0.5 * np.mean((v - batch) ** 2 @ HESSIAN), 0.5 * np.mean(batch**2 @ HESSIAN)
        assert found.observed.excess[walker] == pytest.approx(losses[0] - losses[1], abs=1e-4)
        assert found.observed.reference[walker] == pytest.approx(losses[1], rel=1e-4)
        slope = NBETA * HESSIAN * (v - batch.mean(axis=0)) + GAMMA * v
        np.testing.assert_allclose(
            found.gradient[walker], slope / np.sqrt(PRECISION), rtol=1e-4, atol=1e-4
        )
        assert found.observed.virial[walker] == pytest.approx(v @ slope, rel=1e-4)


def test_walkers_in_turn_move_as_side_by_side(monkeypatch):
    """In many dimensions they move one after the other, with the memory of one step."""
    found, memory = [], []
    for largest in (DIM, DIM - 1):
        monkeypatch.setattr(compiled_steps, "LARGEST_SIDE_BY_SIDE", largest)
        PROGRAMS.clear()
        setup = make_setup()
        rng = np.random.default_rng(0)
        positions = rng.normal(size=(2, WALKERS, DIM)).astype(np.float32)
        source, parts = setup.reader.first, jnp.int32(2)
        inputs = RoundInputs(setup.posterior, exact_scale(), source, None, setup.keys, parts)
        numbers = jnp.float32(0.3), jnp.float32(0.5), jnp.int32(0), jnp.int32(-1), jnp.int32(8)
        program = setup.programs.advance
        compiled = program.lower(inputs, at_center(), *numbers).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        position, momentum = (fill(jnp.zeros((WALKERS, DIM)), rows) for rows in positions)
        start = at_center()._replace(position=position, momentum=momentum)
        state, said = program(inputs, start, *numbers)
        found.append(jax.tree_util.tree_leaves((state, said)))
    PROGRAMS.clear()
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert memory[1] < memory[0] / 2


def test_each_example_that_is_fed_is_read_once():
    numbers = np.arange(10_000, dtype=np.int32)
    feed = Feed(iter(np.split(numbers, 100)))
    reader = FeedReader(feed, numbers[:8], 4, walkers=2, most=32)
    keys, seen, parts = jax.random.split(jax.random.key(0), 2), [], jnp.int32(3)
    for first, steps in ((0, 5), (5, 10), (15, 1)):
        source = reader.read(first, steps, 3)
        for step in range(first, first + steps):
            for part in range(3):
                rows = source.rows(keys, jnp.int32(step), jnp.int32(part), parts)
                seen.append(np.asarray(source.examples)[np.asarray(rows)].ravel())
    np.testing.assert_array_equal(np.concatenate(seen), numbers[: 16 * 3 * 2 * 4])


@pytest.mark.parametrize("width", [0.4, 0.04])
def test_walkers_that_meet_a_wall_turn_back(width):
    """Beyond |w_0| = width the loss is not finite: at two standard deviations, or a fifth of one.

    There the walkers have to begin again with shorter steps.
    """

    def walled(w, batch):
        inside = jnp.where(jnp.abs(w[0]) < width, 0.0, jnp.nan)
        return 0.5 * jnp.mean(jnp.sum((w - batch) ** 2, axis=-1)) + inside

    result = fastvi.estimate_llc(
        walled,
        jnp.zeros(DIM),
        POINTS,
        nbeta=5.0,
        localization=20.0,
        sampler={"start": "localizer"},
        budget=2e4,
        progress=False,
    )
    # all other directions are free, and the truncated one has a little less
    free = 0.5 * 5 / 25 * DIM
    assert abs(result.llc - free) < 4 * result.llc_sem + 0.5 * 5 / 25
    assert result.correction.returned > 0


def test_masked_and_plain_losses_walk_alike():
    """A pair of losses and weights of one is the mean."""

    def pair(w, batch):
        losses = 0.5 * HESSIAN.astype(np.float32) * (w - batch) ** 2
        return losses.sum(-1), jnp.ones(losses.shape[0])

    def plain(w, batch):
        return pair(w, batch)[0].mean()

    options = {
        "nbeta": NBETA,
        "localization": GAMMA,
        "sampler": {"start": "localizer"},
        "budget": 2e4,
        "error": 0.05,
        "progress": False,
    }
    first, second = (
        fastvi.estimate_llc(loss, jnp.zeros(DIM), POINTS, **options) for loss in (pair, plain)
    )
    for result in (first, second):
        assert abs(result.llc - EXACT) < 4 * result.llc_sem
        assert result.work.total_fge * COUNT <= 2e4


def test_fields_of_a_fit_are_refused_beside_the_localizer():
    with pytest.raises(fastvi.ConfigError, match="M is of one"):
        fastvi.estimate_llc(
            lambda w, batch: jnp.mean((w - batch) ** 2),
            jnp.zeros(DIM),
            POINTS,
            sampler={"start": "localizer"},
            M=2,
        )


def test_the_recorded_configuration_walks_again():
    def loss(w, batch):
        return 0.5 * jnp.mean(jnp.sum((w - batch) ** 2, axis=-1))

    options = {"nbeta": 5.0, "localization": 50.0, "progress": False}
    first = fastvi.estimate_llc(loss, jnp.zeros(DIM), POINTS, budget=4000.0, **options)
    again = fastvi.estimate_llc(loss, jnp.zeros(DIM), POINTS, config=first.config, **options)
    assert not first.has_fit
    assert (again.llc, again.llc_sem) == (first.llc, first.llc_sem)
    assert again.config == first.config


def test_the_virial_tells_how_much_too_wide_walkers_are():
    rng = np.random.default_rng(0)
    wide = 1 + 2 * (np.arange(30) < 10)  # variances of 30 directions, of which 10 are three times 1
    position = np.sqrt(wide) * rng.normal(size=(8, 400, 30))
    column = 30 - np.sum(position**2, axis=-1, keepdims=True)
    added = 0.5 * 10 * 2
    assert excess_width(column, 0.0) == pytest.approx(added, rel=0.1)
    assert excess_width(column, 4.0) == pytest.approx(added - 4, rel=0.2)
    assert excess_width(-column, 0.0) == 0
    assert missing_width(column) == 0


def test_few_examples_that_count_are_said_to():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(600, 4)).astype(np.float32)
    weights = np.zeros(600, np.float32)
    weights[:10] = 5 * rng.random(10)  # most batches have none of them

    def loss(w, batch):
        return 0.5 * (batch[0] @ w) ** 2, batch[1]

    result = fastvi.estimate_llc(
        loss,
        jnp.zeros(4),
        (x, weights),
        sampler={"start": "localizer"},
        budget=2e4,
        progress=False,
    )
    curvature = np.linalg.eigvalsh((x * weights[:, None]).T @ x / weights.sum())
    expected = 0.5 * np.sum(600 / np.log(600) * curvature / (600 / np.log(600) * curvature + 1))
    assert abs(result.llc - expected) < 4 * result.llc_sem
    (found,) = [finding for finding in result.health if finding.name == "uneven_weights"]
    share = weights.mean() ** 2 / np.mean(weights**2)
    assert f"as if {100 * share:.2g} %" in found.observed


@pytest.mark.parametrize(("share", "walks"), [(0.5, True), (0.01, False)])
def test_few_examples_that_count_are_left_to_a_fit(share, walks):
    center = jnp.zeros(3000)
    problem = Problem(
        LocalPosterior(center, jnp.float32(10), jnp.float32(1)), hold(jnp.zeros((50, 1))), 50
    )
    look = LossLook(effective_share=share)
    assert chooses_walk(problem, fastvi.VIConfig(), look) == (walks, False)


def test_a_budget_that_pays_for_no_walk_is_told_as_it_was_given():
    words = "budget=300 sample gradients pay for no walk: what is measured before takes"
    with pytest.raises(fastvi.ConfigError, match=words):
        fastvi.estimate_llc(
            loss_fn, PARAMS, POINTS, budget=300, sampler={"start": "localizer"}, progress=False
        )
