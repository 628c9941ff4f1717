"""Flows meet known answers: autodiff Jacobians, closed forms, quadrature."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from conftest import enable_x64, quick_jit

from fastvi import flows
from fastvi._errors import ConfigError, DataError

DIM, CONTEXT = 3, 2
MASK = (1, 0, 1)


def jittered(params, scale=0.1):
    """Move parameters away from the identity."""
    leaves, structure = jax.tree_util.tree_flatten(params)
    rng = np.random.default_rng(7)
    moved = [(np.asarray(a) + scale * rng.normal(size=a.shape)).astype(a.dtype) for a in leaves]
    return jax.tree_util.tree_unflatten(structure, moved)


def gate(context):
    return jnp.sin(context[0]) ** 2


TRANSFORMS = {
    "affine": lambda key, c: flows.Coupling.create(key, DIM, MASK, 8, 1, context_dim=c),
    "spline": lambda key, c: flows.Coupling.create(
        key, DIM, MASK, 8, 1, elementwise=flows.RationalQuadratic(4), context_dim=c
    ),
    "two bins": lambda key, c: flows.Coupling.create(
        key, DIM, MASK, 8, 1, elementwise=flows.RationalQuadratic(2), context_dim=c
    ),
    "linear": lambda key, c: flows.LinearTransform.create(key, DIM, context_dim=c, hidden_dim=8),
    "permutation": lambda key, c: flows.Permutation.create(key, [2, 0, 1]),
    "loft": lambda key, c: flows.LoftTransform.create(key, DIM, tau=0.5),
    "maf": lambda key, c: flows.MaskedAutoregressive.create(key, DIM, 8, 1, context_dim=c),
    "iaf": lambda key, c: flows.MaskedAutoregressive.create(
        key,
        DIM,
        8,
        1,
        context_dim=c,
        fast="forward",
        reverse=True,
        elementwise=flows.RationalQuadratic(3),
    ),
}
OPTIONS = {
    "plain": {},
    "permuted": {"use_permutation": True},
    "linear and trainable base": {"use_linear": True, "trainable_base": True},
    "no loft": {"use_loft": False, "res_scale": 0.3, "activation": jax.nn.elu},
    "low loft": {"loft_tau": 0.7},
    "context": {"context_dim": CONTEXT},
    "extractor": {
        "context_dim": CONTEXT,
        "context_extractor_hidden_dim": 4,
        "context_extractor_n_layers": 1,
    },
    "feature dim": {
        "context_dim": CONTEXT,
        "context_extractor_hidden_dim": 4,
        "context_feature_dim": 3,
    },
    "gate": {"context_dim": CONTEXT, "identity_gate": gate, "use_linear": True, "loft_tau": 0.7},
}
BUILDERS = {
    "realnvp": flows.build_realnvp,
    "spline_realnvp": functools.partial(flows.build_spline_realnvp, num_bins=3),
    "maf": flows.build_maf,
    "spline_maf": functools.partial(flows.build_spline_maf, num_bins=3),
}
# Every option with the cheapest builder, and each other builder with those that reach into its
# layers.
CASES = [
    *(("realnvp", options) for options in OPTIONS),
    *(("spline_realnvp", options) for options in ("permuted", "feature dim", "gate")),
    *(("maf", options) for options in ("permuted", "gate")),
    ("spline_maf", "context"),
]


def check_bijection(forward, inverse, x):
    """Hold log-determinants to autodiff and the inverse to the forward map, in float64."""

    @quick_jit
    def everything(x):
        y, log_det = forward(x)
        jacobians = jax.vmap(jax.jacrev(lambda one, i: forward(x.at[i].set(one))[0][i]))(
            x, jnp.arange(len(x))
        )
        back, back_log_det = inverse(y)
        return y, log_det, jnp.linalg.slogdet(jacobians)[1], back, back_log_det

    y, log_det, truth, back, back_log_det = everything(x)
    np.testing.assert_allclose(log_det, truth, atol=1e-9)
    np.testing.assert_allclose(back, x, atol=1e-9)
    np.testing.assert_allclose(back_log_det, -log_det, atol=1e-9)
    assert np.max(np.abs(y - x)) > 1e-3


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_has_the_log_det_of_autodiff_and_an_inverse(name, context_dim, x64):
    transform, start = TRANSFORMS[name](jax.random.key(0), context_dim)
    params = jittered(start, 0.5)
    x = 2 * jax.random.normal(jax.random.key(1), (5, DIM))
    context = jax.random.normal(jax.random.key(2), (5, CONTEXT)) if context_dim else None
    check_bijection(
        lambda x: transform.forward(params, x, context),
        lambda y: transform.inverse(params, y, context),
        x,
    )
    if name not in ("permutation", "loft"):
        same, log_det = quick_jit(transform.forward)(start, x, context)
        np.testing.assert_allclose(same, x, atol=1e-12)
        np.testing.assert_allclose(log_det, 0, atol=1e-12)


@pytest.mark.parametrize(("builder", "options"), CASES)
def test_builder_options_give_densities_that_agree(builder, options, x64):
    context_dim = OPTIONS[options].get("context_dim", 0)
    flow, start = BUILDERS[builder](jax.random.key(0), DIM, 2, 8, 1, **OPTIONS[options])
    params = jittered(start)
    x = jax.random.normal(jax.random.key(1), (4, DIM))
    context = jax.random.normal(jax.random.key(2), (4, CONTEXT)) if context_dim else None
    check_bijection(
        lambda x: flow.forward(params, x, context), lambda y: flow.inverse(params, y, context), x
    )

    @quick_jit
    def densities(params, start, x):
        sample, log_prob = flow.sample_and_log_prob(params, jax.random.key(3), (4,), context)
        return log_prob, flow.log_prob(params, sample, context), flow.log_prob(start, x, context)

    log_prob, again, log_prob_at_start = densities(params, start, x)
    np.testing.assert_allclose(again, log_prob, atol=1e-9)
    if "loft_tau" not in OPTIONS[options]:
        np.testing.assert_allclose(
            log_prob_at_start, scipy.stats.norm.logpdf(x).sum(axis=-1), atol=1e-9
        )


def test_builders_have_the_defaults_of_the_specification():
    expected = {
        "res_scale": 0.1,
        "trainable_base": False,
        "use_linear": False,
        "use_permutation": False,
        "use_loft": True,
        "loft_tau": 1000.0,
        "activation": jax.nn.tanh,
        "context_extractor_hidden_dim": 0,
        "context_extractor_n_layers": 2,
        "context_feature_dim": None,
        "return_transform_only": False,
    }
    found = vars(flows.BuilderOptions())
    assert {name: found[name] for name in expected} == expected
    assert flows.BoundedAffine().max_log_scale == 5.0
    spline = flows.RationalQuadratic()
    assert (spline.num_bins, spline.tail_bound) == (8, 5.0)
    given_by_name = {k: v for k, v in expected.items() if k != "context_extractor_n_layers"}
    for build in (flows.build_realnvp, flows.build_spline_realnvp):
        (plain, params), (given, same) = (
            build(jax.random.key(0), 3, 2, 8, 1, **options) for options in ({}, given_by_name)
        )
        assert plain == given
        jax.tree_util.tree_map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (flows.build_realnvp, {"max_log_scale": 1.5}),
        (flows.build_spline_realnvp, {"num_bins": 3, "tail_bound": 2.0, "min_derivative": 0.1}),
        (flows.build_spline_maf, {"num_bins": 3, "max_derivative": 4.0}),
    ],
)
def test_options_of_the_map_reach_every_layer(build, options):
    flow, _ = build(jax.random.key(0), 3, 2, 8, 1, use_loft=False, **options)
    for block in flow.transform.blocks:
        assert {name: getattr(block.elementwise, name) for name in options} == options


def test_parameters_have_the_documented_structure():
    flow, params = flows.build_realnvp(
        jax.random.key(0),
        4,
        3,
        8,
        1,
        use_linear=True,
        trainable_base=True,
        context_dim=2,
        context_extractor_hidden_dim=4,
    )
    assert set(params) == {"base", "transform", "feature_extractor"}
    assert isinstance(params["transform"], list)
    assert len(params["transform"]) == 1 + 3 + 1
    assert hash(flow) == hash(flow)
    assert jax.tree_util.tree_leaves(flow) == []
    bijection, params = flows.build_realnvp(
        jax.random.key(0), 4, 2, 8, 1, return_transform_only=True
    )
    assert isinstance(bijection, flows.Bijection)
    assert set(params) == {"transform"}
    blocks = [flows.LoftTransform.create(None, dim=4)]
    for _, params in (
        flows.build_maf(jax.random.key(0), 4, 1, 8, 1),
        flows.assemble_flow(blocks, flows.StandardNormal(4)),
    ):
        assert params["base"] == {}


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_blocks_in_a_loop_give_what_they_give_one_by_one(dim, x64):
    options = {"use_permutation": True, "use_linear": True}
    flow, params = flows.build_spline_realnvp(
        jax.random.key(0), dim, 5, 8, 1, num_bins=3, **options
    )
    params, x = jittered(params), jax.random.normal(jax.random.key(1), (6, dim))

    @quick_jit
    def one_by_one(params, y):
        log_det = 0.0
        for block, values in zip(flow.transform.blocks, params["transform"], strict=True):
            y, more = block.forward(values, y)
            log_det = log_det + more
        return y, log_det

    y, log_det = one_by_one(params, x)
    together, total = quick_jit(flow.forward)(params, x)
    np.testing.assert_allclose(together, y, atol=1e-12)
    np.testing.assert_allclose(total, log_det, atol=1e-12)
    loops = str(jax.make_jaxpr(lambda p: flow.forward(p, x))(params)).count("scan[")
    assert loops == 1


def test_affine_coupling_is_its_formula(x64):
    layer, params = flows.Coupling.create(
        jax.random.key(0), 2, (1, 0), 4, 0, elementwise=flows.BoundedAffine(2.0)
    )
    params["mlp"]["dense_out"] = {"kernel": jnp.zeros((4, 2)), "bias": jnp.asarray([0.3, 0.7])}
    y, log_det = layer.forward(params, jnp.asarray([1.5, -2.0]))
    log_scale, bound = 2 * np.tanh(0.35), np.exp(2.0)
    np.testing.assert_allclose(
        y, [1.5, -2 * np.exp(log_scale) + bound * np.tanh(0.3 / bound)], rtol=1e-12
    )
    np.testing.assert_allclose(log_det, log_scale, rtol=1e-12)


def test_spline_is_that_of_durkan_et_al(x64):
    spline = flows.RationalQuadratic(num_bins=3, tail_bound=2.0)
    raw = jnp.asarray([0.3, -0.5, 0.9, -0.2, 0.4, 0.1, 0.8, -2.0])
    x = np.linspace(-2.5, 2.5, 41)
    y, log_slope = spline.forward(
        jnp.broadcast_to(raw[:, None, None], (8, 1, 41)), jnp.asarray(x[None]), None
    )
    widths, heights = (
        4 * (0.01 + 0.97 * np.exp(r) / np.exp(r).sum())
        for r in (np.asarray(raw[:3]), np.asarray(raw[3:6]))
    )
    xs, ys = (np.concatenate([[-2], -2 + np.cumsum(sides)]) for sides in (widths, heights))
    slopes = np.concatenate([[1], 0.01 + 9.99 / (1 + np.exp(-np.asarray(raw[6:]))), [1]])
    for at, got, got_slope in zip(x, y[0], log_slope[0], strict=True):
        k = min(max(np.searchsorted(xs, at, side="right") - 1, 0), 2)
        s, xi = heights[k] / widths[k], (at - xs[k]) / widths[k]
        below = s + (slopes[k + 1] + slopes[k] - 2 * s) * xi * (1 - xi)
        value = ys[k] + heights[k] * (s * xi**2 + slopes[k] * xi * (1 - xi)) / below
        slope = (
            s**2
            * (slopes[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + slopes[k] * (1 - xi) ** 2)
            / below**2
        )
        inside = abs(at) <= 2
        np.testing.assert_allclose(got, value if inside else at, atol=1e-12)
        np.testing.assert_allclose(got_slope, np.log(slope) if inside else 0, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradient_of_the_spline_is_that_of_finite_differences(direction, x64):
    spline = flows.RationalQuadratic(num_bins=4)
    raw = jax.random.normal(jax.random.key(0), (spline.num_params, 2, 6))
    x = 2 * jax.random.normal(jax.random.key(1), (2, 6))

    @quick_jit
    def value(raw, x):
        y, log_slope = getattr(spline, direction)(raw, x, None)
        return jnp.sum(jnp.sin(y)) + jnp.sum(log_slope * jnp.cos(log_slope))

    grads = quick_jit(jax.grad(value.__wrapped__, (0, 1)))(raw, x)
    for seed in range(3):
        steps = [jax.random.normal(jax.random.key(10 + seed), a.shape) for a in (raw, x)]
        slope = sum(jnp.vdot(g, s) for g, s in zip(grads, steps, strict=True))
        ends = [value(raw + e * steps[0], x + e * steps[1]) for e in (1e-6, -1e-6)]
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("builder", BUILDERS)
def test_density_integrates_to_one(builder, x64):
    flow, params = BUILDERS[builder](
        jax.random.key(0), 2, 4, 8, 1, use_linear=True, trainable_base=True
    )
    params = jittered(params, 0.05)
    axis = np.linspace(-12, 12, 601)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1))
    mass = np.exp(quick_jit(flow.log_prob)(params, grid)).sum() * (axis[1] - axis[0]) ** 2
    np.testing.assert_allclose(mass, 1, atol=1e-4)


def test_given_noise_makes_the_sample_of_its_key_and_mirrored_pairs():
    flow, params = flows.build_realnvp(jax.random.key(0), 3, 2, 8, 1, trainable_base=True)
    params, noise = jittered(params), flows.draw_noise(jax.random.key(3), (4, 3))
    sample, log_prob = flow.sample_and_log_prob(params, jax.random.key(3), (4,))
    given, given_log_prob = flow.transform_noise(params, noise)
    np.testing.assert_allclose(given, sample, atol=1e-6)
    np.testing.assert_allclose(given_log_prob, log_prob, atol=1e-5)
    np.testing.assert_array_equal(flow.sample(params, jax.random.key(3), (4,)), sample)
    mirrored = flow.inverse(params, flow.transform_noise(params, -noise)[0])[0]
    loc, scale = params["base"]["loc"], jnp.exp(params["base"]["log_scale"])
    np.testing.assert_allclose((mirrored - loc) / scale, -noise, atol=1e-5)


def trained(flow, params, data, steps=150):
    """Fit a flow to data by Adam."""
    optimizer = optax.adam(5e-3)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: -jnp.mean(flow.log_prob(p, data)))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    run = quick_jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=steps)[0][0])
    return run(params)


def ring(size, dim):
    """A ring of radius 2 in the first two features, normals in the others."""
    rng = np.random.default_rng(0)
    angle, noise = rng.uniform(0, 2 * np.pi, size), rng.normal(size=(size, dim))
    around = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.3 * noise[:, :2]
    return jnp.asarray(np.concatenate([around, noise[:, 2:]], axis=1))


def test_density_of_a_trained_flow_integrates_to_one():
    flow, start = flows.build_spline_realnvp(
        jax.random.key(0), 2, 4, 16, 1, use_linear=True, trainable_base=True
    )
    data = ring(400, 2)
    params = trained(flow, start, data)
    assert jnp.mean(flow.log_prob(params, data)) > jnp.mean(flow.log_prob(start, data)) + 0.5
    axis = np.linspace(-12, 12, 601)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1), jnp.float32)
    mass = np.exp(np.asarray(flow.log_prob(params, grid), float)).sum() * (axis[1] - axis[0]) ** 2
    np.testing.assert_allclose(mass, 1, atol=2e-3)


def test_round_trip_in_float32_over_wide_inputs():
    flow, params = flows.build_spline_realnvp(jax.random.key(0), 6, 8, 16, 1)
    # Splines that do not depend on the features that pass. Networks of random weights make eight
    # layers a map whose condition is 1e4 and more where no data are, and float32 cannot follow its
    # inverse.
    for i, block in enumerate(params["transform"][:-1]):
        last = block["mlp"]["dense_out"]
        last["bias"] = last["bias"] + 0.2 * jax.random.normal(jax.random.key(i), last["bias"].shape)
    x = jax.random.uniform(jax.random.key(1), (4000, 6), minval=-50.0, maxval=50.0)
    x = jnp.concatenate([x, x / 10, x / 50])
    y, log_det = flow.forward(params, x)
    back, back_log_det = flow.inverse(params, y)
    assert float(jnp.max(jnp.abs(back - x))) < 1e-5
    assert float(jnp.max(jnp.abs(log_det + back_log_det))) < 1e-4
    with enable_x64(True):
        wide = jax.tree_util.tree_map(lambda a: a.astype(jnp.float64), params)
        truth = flow.forward(wide, x.astype(jnp.float64))[1]
    np.testing.assert_allclose(log_det, truth, atol=1e-4)


def test_loft_is_stable_far_out():
    loft, params = flows.LoftTransform.create(None, 2, tau=1000.0)
    x = jnp.asarray([[1e30, -1e4], [999.0, -1e-30]])
    y, log_det = loft.forward(params, x)
    np.testing.assert_allclose(y[0], [1000 + np.log1p(1e30), -1000 - np.log1p(9000)], rtol=1e-6)
    np.testing.assert_allclose(log_det, [-np.log1p(1e30) - np.log1p(9000), 0], rtol=1e-6)
    np.testing.assert_array_equal(y[1], x[1])


def test_vmap_over_parameters_and_keys_gives_the_single_calls():
    flow, params = flows.build_spline_realnvp(jax.random.key(0), 4, 4, 8, 1, num_bins=3)
    chains = [jittered(params, scale) for scale in (0.05, 0.1, 0.2)]
    stacked = jax.tree_util.tree_map(lambda *a: jnp.stack(a), *chains)
    keys = jax.random.split(jax.random.key(5), 3)

    def everything(params, key):
        x, log_prob = flow.sample_and_log_prob(params, key, (6,))
        return x, log_prob, jax.grad(lambda p: flow.log_prob(p, x).sum())(params)

    x, log_prob, grads = quick_jit(jax.vmap(everything))(stacked, keys)
    one = quick_jit(everything)
    for i, (chain, key) in enumerate(zip(chains, keys, strict=True)):
        single_x, single_log_prob, grad = one(chain, key)
        np.testing.assert_allclose(x[i], single_x, atol=1e-5)
        np.testing.assert_allclose(log_prob[i], single_log_prob, atol=1e-4)
        for got, wanted in zip(*map(jax.tree_util.tree_leaves, (grads, grad)), strict=True):
            np.testing.assert_allclose(got[i], wanted, rtol=2e-3, atol=2e-3)


def test_raw_and_typed_keys_draw_what_jax_draws():
    flow, params = flows.build_realnvp(jax.random.PRNGKey(0), 3, 2, 8, 1)
    expected = jax.random.normal(jax.random.key(4), (7, 3))
    for key in (jax.random.PRNGKey(4), jax.random.key(4)):
        np.testing.assert_allclose(flow.sample(params, key, (7,)), expected, atol=1e-6)


def test_shared_and_separate_contexts_agree():
    flow, params = flows.build_spline_realnvp(jax.random.key(0), 3, 2, 8, 1, context_dim=CONTEXT)
    params, x, context = jittered(params), jnp.ones((5, 3)), jnp.asarray([0.3, -1.0])
    log_prob = quick_jit(flow.log_prob)
    shared = log_prob(params, x, context)
    np.testing.assert_allclose(log_prob(params, x, jnp.tile(context, (5, 1))), shared, rtol=1e-5)
    assert abs(float(log_prob(params, x, -context)[0] - shared[0])) > 1e-4


def test_autoregressive_layer_has_a_triangular_jacobian(x64):
    layer, params = flows.MaskedAutoregressive.create(jax.random.key(0), 5, 16, 2, reverse=True)
    moved = jittered(params, 0.5)
    jacobian = quick_jit(jax.jacrev(lambda x: layer.inverse(moved, x)[0]))(jnp.ones(5))
    np.testing.assert_array_equal(jnp.tril(jacobian, -1), 0)
    assert np.all(np.abs(np.asarray(jacobian)[np.triu_indices(5)]) > 1e-8)


FLOW, PARAMS = flows.build_realnvp(jax.random.key(0), 3, 2, 8, 1)
CONDITIONAL, CONDITIONAL_PARAMS = flows.build_realnvp(jax.random.key(0), 3, 2, 8, 1, context_dim=2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: FLOW.log_prob(PARAMS, jnp.ones((4, 2))), DataError, "size 3"),
        (lambda: FLOW.log_prob(PARAMS, jnp.ones((4, 3), int)), DataError, "floating"),
        (lambda: FLOW.log_prob(PARAMS, jnp.ones(3), jnp.ones(2)), DataError, "context_dim is 0"),
        (lambda: CONDITIONAL.log_prob(CONDITIONAL_PARAMS, jnp.ones(3)), DataError, "pass context"),
        (
            lambda: CONDITIONAL.log_prob(CONDITIONAL_PARAMS, jnp.ones((4, 3)), jnp.ones((3, 2))),
            DataError,
            "broadcast",
        ),
        (
            lambda: FLOW.log_prob({"base": None, "transform": []}, jnp.ones(3)),
            DataError,
            "3 blocks",
        ),
        (lambda: FLOW.sample(PARAMS, jax.random.key(0), 5), DataError, "tuple"),
        (lambda: flows.build_realnvp(jax.random.key(0), 3, 1, 8, 1), ConfigError, "never move"),
        (lambda: flows.build_realnvp(jax.random.key(0), 0, 2, 8, 1), ConfigError, "dim"),
        (
            lambda: flows.build_realnvp(jax.random.key(0), 3, 2, 8, 1, use_lofft=True),
            ConfigError,
            "use_loft",
        ),
        (
            lambda: flows.build_realnvp(jax.random.key(0), 3, 2, 8, 1, max_log_scale=-1.0),
            ConfigError,
            "positive",
        ),
        (
            lambda: flows.build_spline_realnvp(jax.random.key(0), 3, 2, 8, 1, min_bin_width=0.2),
            ConfigError,
            "num_bins",
        ),
        (
            lambda: flows.build_realnvp(
                jax.random.key(0), 3, 2, 8, 1, context_extractor_hidden_dim=4
            ),
            ConfigError,
            "context_dim",
        ),
        (
            lambda: flows.Coupling.create(jax.random.key(0), 3, (1, 0), 8, 1),
            ConfigError,
            "dim=3",
        ),
        (lambda: flows.Permutation([0, 0, 1]), ConfigError, "once"),
        (lambda: flows.LoftTransform(3, -1.0), ConfigError, "positive"),
    ],
)
def test_errors_say_the_rule(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_options_are_all_documented():
    fields = [field.name for field in dataclasses.fields(flows.BuilderOptions)]
    assert all(f"{name}: " in flows.BuilderOptions.__doc__ for name in fields)
