import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastvi.families.updates import Blocks, UpdateRules
from fastvi.fitting.optimizer import (
    ADAM_B1,
    ADAM_B2,
    TRUNCATION_STEPS,
    clip_by_typical_norm,
    gradient_norm,
    make_optimizer,
    scale,
    scale_by_moments,
)
from fastvi.fitting.schedule import (
    DECAY_FRACTION,
    MIN_DECAY,
    decay_length,
    elbo_trend,
    negligible_nats,
)
from fastvi.fitting.step_plan import (
    FINAL_RATE,
    Phases,
    ScheduleSettings,
    elapsed_decay,
    frozen,
    learning_rate,
    plan_steps,
)

PARAMS = {"a": jnp.zeros(4), "b": jnp.zeros((3, 5))}
START = jnp.zeros(())
DAMPING = 0.05
NEGLIGIBLE = 0.5


def rules(shared=(), blocked=()):
    def flags(names):
        return {name: name in names for name in PARAMS}

    return UpdateRules(
        rates=dict.fromkeys(PARAMS, 1.0),
        shared_rows=flags(shared),
        blocked=flags(blocked),
        damping=dict.fromkeys(PARAMS, DAMPING),
        per_component=flags(()),
    )


def gradients(seed, steps=20):
    rng = np.random.default_rng(seed)
    scale = {name: np.exp(rng.normal(size=leaf.shape)) for name, leaf in PARAMS.items()}
    return [
        {
            name: jnp.asarray(scale[name] * rng.normal(size=leaf.shape), jnp.float32)
            for name, leaf in PARAMS.items()
        }
        for _ in range(steps)
    ]


def test_moments_are_adam():
    ours, theirs = scale_by_moments(rules()), optax.scale_by_adam(ADAM_B1, ADAM_B2, DAMPING)
    state, other = ours.init(PARAMS), theirs.init(PARAMS)
    for gradient in gradients(0):
        actual, state = ours.update(gradient, state, elapsed=START)
        expected, other = theirs.update(gradient, other)
        for name in PARAMS:
            np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=1e-7)


def test_moments_freeze_at_the_end():
    transform = scale_by_moments(rules(shared=("b",)))
    state = transform.init(PARAMS)
    for gradient in gradients(1):
        _, state = transform.update(gradient, state, elapsed=START)
    frozen = state
    for gradient in gradients(2):
        large = jax.tree_util.tree_map(lambda leaf: 100 * leaf, gradient)
        _, frozen = transform.update(large, frozen, elapsed=jnp.ones(()))
    for name in PARAMS:
        np.testing.assert_array_equal(frozen.square[name], state.square[name])
    # between, the gain falls with the square of what is left: 0.01 / 4
    _, half = transform.update(gradients(3)[0], state, elapsed=jnp.asarray(0.5))
    square = np.asarray(gradients(3)[0]["a"]) ** 2
    expected = state.square["a"] + (1 - ADAM_B2) / 4 * (square - state.square["a"])
    np.testing.assert_allclose(half.square["a"], expected, rtol=1e-5)


def test_shared_rows_keep_their_direction():
    transform = scale_by_moments(rules(shared=("b",)))
    first = gradients(4)[0]
    scaled, state = transform.update(first, transform.init(PARAMS), elapsed=START)
    assert state.square["b"].shape == (3, 1)
    row_size = np.sqrt(np.mean(np.asarray(first["b"]) ** 2, axis=-1, keepdims=True))
    # bias-corrected, the first step is the gradient over its row's root mean square
    np.testing.assert_allclose(scaled["b"], first["b"] / (row_size + DAMPING), rtol=1e-5)
    np.testing.assert_allclose(scaled["a"], first["a"] / (np.abs(first["a"]) + DAMPING), rtol=1e-5)


MATRICES = {"a": jnp.zeros(4), "b": jnp.zeros((3, 2, 5))}


def blocks(labels, seed=5, terms=3):
    rng = np.random.default_rng(seed)
    sizes = (len(labels), terms, 2), (len(labels), terms, 5)
    return Blocks(
        jnp.asarray(labels), *(jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    )


def written_out(gradient):
    return np.einsum("btr,btd->brd", gradient.left, gradient.right)


def test_blocks_touch_their_own_moments_only():
    transform = scale_by_moments(rules(("b",), blocked=("b",)))
    state = transform.init(MATRICES)
    square, left = np.zeros((3, 2, 1)), np.ones(3)
    for seed, labels in enumerate(([0], [2], [0], [0, 2], [2, 2])):
        gradient = blocks(labels, seed)
        scaled, state = transform.update({"a": jnp.ones(4), "b": gradient}, state, elapsed=START)
        expected = []
        for label, value in zip(labels, written_out(gradient), strict=True):
            new = np.mean(value**2, axis=-1, keepdims=True)
            square[label] += (1 - ADAM_B2) * (new - square[label])
            left[label] *= ADAM_B2
            expected.append(value / (np.sqrt(square[label] / (1 - left[label])) + DAMPING))
        np.testing.assert_array_equal(scaled["b"].index, labels)
        np.testing.assert_allclose(written_out(scaled["b"]), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.square["b"], square, rtol=1e-4)
    assert np.all(state.square["b"][1] == 0)


def test_blocks_need_moments_that_rows_share():
    transform = scale_by_moments(rules((), blocked=("b",)))
    gradient, state = {"a": jnp.ones(4), "b": blocks([1])}, transform.init(MATRICES)
    with pytest.raises(ValueError, match="share"):
        transform.update(gradient, state, elapsed=START)


def test_the_norm_of_blocks_is_that_of_the_matrices_they_stand_for():
    gradient = blocks([2, 0])
    matrices = written_out(gradient)
    expected = np.sqrt(4 + np.sum(matrices**2))
    found = gradient_norm({"a": jnp.ones(4), "b": gradient})
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(
        written_out(scale(gradient, 3.0)), 3 * matrices, rtol=1e-5, atol=1e-6
    )


def clipped(transform, vectors):
    state = transform.init(None)
    out = []
    for vector in vectors:
        result, state = transform.update({"v": jnp.asarray(vector, jnp.float32)}, state)
        out.append(np.asarray(result["v"]))
    return out, state


def test_ordinary_gradients_are_left_alone():
    vectors = np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32)
    out, _ = clipped(clip_by_typical_norm(5.0), vectors)
    np.testing.assert_array_equal(np.stack(out), vectors)


def test_an_outlier_is_cut_to_the_bound():
    unit = np.full(4, 0.5, np.float32)  # norm 1
    out, _ = clipped(clip_by_typical_norm(3.0), [unit] * 10 + [1000 * unit, unit, 1000 * unit])
    np.testing.assert_allclose(out[10], 3 * unit, rtol=1e-5)
    np.testing.assert_array_equal(out[11], unit)
    # the cut outlier counts with the bound, 9 instead of 1e6
    weights = 0.98 ** np.arange(11, -1, -1.0)
    typical = np.sqrt(np.average([1.0] * 10 + [9.0, 1.0], weights=weights))
    np.testing.assert_allclose(np.linalg.norm(out[12]), 3 * typical, rtol=1e-4)


def test_the_bound_grows_with_the_root_of_time():
    steps = int(4 * TRUNCATION_STEPS)
    unit = np.full(4, 0.5, np.float32)

    def bound_after(count):
        def body(state, vector):
            result, state = transform.update({"v": vector}, state)
            return state, result

        transform = clip_by_typical_norm(3.0)
        state, _ = jax.lax.scan(body, transform.init(None), jnp.tile(unit, (count, 1)))
        return float(gradient_norm(transform.update({"v": jnp.asarray(1000 * unit)}, state)[0]))

    np.testing.assert_allclose(bound_after(int(TRUNCATION_STEPS)), 3.0, rtol=1e-3)
    np.testing.assert_allclose(bound_after(steps), 6.0, rtol=1e-3)


def test_clipping_scales_blocks_but_not_their_index():
    gradient = {"a": jnp.full(4, 1.0), "b": blocks([2])}
    transform = clip_by_typical_norm(1.0)
    _, state = transform.update(gradient, transform.init(MATRICES))
    large = scale(gradient, 10.0)
    result, _ = transform.update(large, state)
    assert result["b"].index.dtype == gradient["b"].index.dtype
    np.testing.assert_array_equal(result["b"].index, [2])
    np.testing.assert_allclose(
        written_out(result["b"]), written_out(gradient["b"]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(result["a"], 1.0, rtol=1e-5)


def test_nan_gradients_stay_nan():
    out, _ = clipped(clip_by_typical_norm(2.0), [np.ones(2), np.array([np.nan, 1.0])])
    assert np.isnan(out[1]).any()


@pytest.mark.parametrize(("limit", "norm"), [(None, 1000.0), (2.0, 2.0)])
def test_clipping_can_be_turned_off(limit, norm):
    optimizer = make_optimizer(limit, rules())
    state = optimizer.init(PARAMS)
    unit = {"a": jnp.zeros(4).at[0].set(1.0), "b": jnp.zeros((3, 5))}
    _, state = optimizer.update(unit, state, elapsed=START)
    outlier = jax.tree_util.tree_map(lambda leaf: 1000 * leaf, unit)
    _, state = optimizer.update(outlier, state, elapsed=jnp.ones(()))
    # the first moment shows what came through: 0.9 * 0.1 + 0.1 * clipped
    np.testing.assert_allclose(state[1].mean["a"][0], 0.09 + 0.1 * norm, rtol=1e-4)


def rates(schedule, warmup=0, decay_start=0, end=100):
    settings, phases = ScheduleSettings(rate=0.5, decay=schedule), Phases(warmup, decay_start, end)
    return learning_rate(settings, phases, np.arange(end))


def test_learning_rate_schedules():
    share = np.arange(100) / 100
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + np.cos(np.pi * share))
    np.testing.assert_allclose(rates("cosine"), 0.5 * cosine, rtol=1e-5)
    np.testing.assert_allclose(
        rates("linear_decay"), 0.5 * (1 - (1 - FINAL_RATE) * share), rtol=1e-5
    )
    np.testing.assert_allclose(rates("none"), 0.5, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear_decay"])
def test_learning_rate_phases(schedule):
    values = rates(schedule, warmup=10, decay_start=40)
    np.testing.assert_allclose(values[:10], 0.5 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(values[9:41], 0.5, rtol=1e-6)
    assert np.all(np.diff(values[40:]) < 0)
    assert values[-1] == pytest.approx(0.5 * FINAL_RATE, abs=0.01)
    np.testing.assert_allclose(
        rates("none", warmup=10)[:11], 0.5 * np.minimum(1, np.arange(1, 12) / 10), rtol=1e-6
    )


def test_elapsed_decay_runs_from_0_to_1():
    actual = elapsed_decay(Phases(0, 40, 60), np.array([0, 40, 45, 60, 99]))
    np.testing.assert_allclose(actual, [0, 0, 0.25, 1, 1], rtol=1e-12)
    # no decay phase: nothing has elapsed at its start
    assert elapsed_decay(Phases(0, 60, 60), np.array([60])) == 0


def test_a_plan_has_the_numbers_of_its_steps():
    schedule = ScheduleSettings(steps=10, rate=0.5, decay="none", record_every=4)
    plan = plan_steps(schedule, Phases(0, 0, 10), 6, 3, 5, np.float32)
    assert plan.length == 3
    np.testing.assert_array_equal(plan.rows.step, [6, 7, 8, 9, 10])
    np.testing.assert_array_equal(plan.rows.rate, np.float32([0.5, 0.5, 0.5, 0.5, 0]))
    np.testing.assert_array_equal(plan.rows.records, [False, False, True, False, False])
    np.testing.assert_array_equal(plan.rows.prunes, [False, True, False, False, False])
    assert not np.any(frozen(plan).rows.rate)


def test_trend_of_a_line_is_its_rise():
    line = np.tile(0.25 * np.arange(1000.0), (3, 1))
    trend = elbo_trend(line)
    # from the mean of the first tenth of the last 500 steps to that of the last tenth
    assert trend.window == 500
    np.testing.assert_allclose(trend.gain, 0.25 * 450, rtol=1e-9)
    assert trend.error < 1e-9
    assert not trend.is_flat(NEGLIGIBLE)
    assert elbo_trend(-line).gain < 0
    assert elbo_trend(-line).is_flat(NEGLIGIBLE)


def test_trend_errors_are_calibrated():
    rng = np.random.default_rng(0)
    rise = 3.0
    trends = [
        elbo_trend(rise * np.linspace(0, 1, 400) + rng.normal(size=(2, 400)) * 20)
        for _ in range(400)
    ]
    gains = np.array([trend.gain for trend in trends])
    expected = (
        rise * 0.5 * 180 / 199.5
    )  # half of the run, between the middles of its first and last tenth
    assert abs(gains.mean() - expected) < 4 * gains.std() / np.sqrt(len(gains))
    ratio = gains.var() / np.mean([trend.error**2 for trend in trends])
    assert 0.8 < ratio < 1.25


def test_a_gain_counts_by_the_dimension():
    rise = np.linspace(0, 4, 1000)[None]  # 2 nats over the last half
    assert elbo_trend(rise).is_flat(negligible_nats(NEGLIGIBLE, 10_000))
    assert not elbo_trend(rise).is_flat(negligible_nats(NEGLIGIBLE, 1_000))


def test_trend_is_flat_within_noise_only():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(4, 1000))
    assert elbo_trend(noise).is_flat(NEGLIGIBLE)
    assert elbo_trend(noise + NEGLIGIBLE * 0.5 * np.linspace(0, 2, 1000)).is_flat(NEGLIGIBLE)
    assert not elbo_trend(noise + 20 * np.linspace(0, 1, 1000)).is_flat(NEGLIGIBLE)
    assert elbo_trend(20 * noise + 1.0 * np.linspace(0, 1, 1000)).is_flat(NEGLIGIBLE)


@pytest.mark.parametrize(("steps", "window"), [(5, 0), (60, 60), (99, 90), (150, 100), (1000, 500)])
def test_trend_window(steps, window):
    trend = elbo_trend(np.zeros((1, steps)))
    assert trend.window == window
    assert trend.is_flat(NEGLIGIBLE) == (window > 0)


def test_decay_length():
    assert decay_length(10, dim=50) == MIN_DECAY
    assert decay_length(100_000, dim=50) == int(DECAY_FRACTION * 100_000)
    assert decay_length(10, dim=16) == 4 * MIN_DECAY
    assert decay_length(10, dim=1) == 16 * MIN_DECAY


def test_rows_whose_terms_cancel_have_no_negative_square():
    right = jax.random.normal(jax.random.key(0), (1, 1, 1000))
    outer = Blocks(
        jnp.asarray([0]),
        jnp.asarray([[[1.0, 0.3], [-1.0, -0.3]]]),
        jnp.concatenate([right, right * (1 + 1e-6)], axis=1),
    )
    squares = np.asarray(outer.row_squares())
    assert np.all(squares >= 0)
    assert np.all(squares < 1e-3)
