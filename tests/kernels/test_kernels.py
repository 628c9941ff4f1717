import functools
import io
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import also_as_users_compile, enable_x64, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvi import kernels
from fastvi._errors import ConfigError
from fastvi.kernels import (
    OPS,
    hutchinson,
    mixture_grad,
    noise,
    registry,
    triangular,
    woodbury,
)
from fastvi.kernels._dispatch import Implementation, Op, current_platform
from fastvi.kernels.mixture_grad import reference as gradient_reference
from fastvi.kernels.order import upper_median
from fastvi.kernels.woodbury import Mixture
from tests.support import hutchinson_cases
from tests.support import woodbury_cases as cases
from tests.support.density_draws import with_nan


def available(op):
    """The implementations that run here, the reference aside.

    Without a GPU, tests/kernels/test_pallas.py has Pallas's, interpreted.
    """
    return [
        name
        for name, implementation in OPS[op].implementations.items()
        if name != "reference" and implementation.obstacle(current_platform()) is None
    ]


# jax 0.11 announces the end of the backend that Pallas uses
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton:DeprecationWarning")
IMPLEMENTATIONS = sorted(available("woodbury"))
SHARED_MEANS = ("pallas",)  # implementations without means by component
HUTCHINSON = sorted(available("hutchinson"))
FLOAT32 = [
    name for name, case in cases.CASES.items() if case.dim > 5 and name != "shared_steep_crossed"
]
FLOAT32_LIMITS = {
    "shared_steep_crossed": (2.0, 0.1)
}  # nats of log_prob, relative error of the score


def by_implementation(names, *as_users):
    """Return parameters (name, implementation): all that an implementation takes.

    Those of `as_users` also run compiled as people compile them.
    """
    assert set(as_users) <= set(names)
    return [
        pytest.param(
            *(name, implementation), marks=[pytest.mark.as_users_compile] * (name in as_users)
        )
        for name in names
        for implementation in IMPLEMENTATIONS
        if cases.CASES[name].num_offsets < 2 or implementation not in SHARED_MEANS
    ]


@pytest.fixture(autouse=True)
def exact_products():
    """As estimates run: a GPU computes products in single precision with 11 bits by default."""
    with jax.default_matmul_precision("highest"):
        yield


def leaf_pairs(actual, expected):
    assert jax.tree_util.tree_structure(actual) == jax.tree_util.tree_structure(expected)
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree_util.tree_leaves(expected),
        strict=True,
    )
    return [
        (jax.tree_util.keystr(path), np.asarray(got), np.asarray(want))
        for (path, got), want in leaves
    ]


def assert_leaves_close(actual, expected, tolerance):
    """Compare in units of each leaf's largest entry."""
    for path, got, want in leaf_pairs(actual, expected):
        scale = np.max(np.abs(want), initial=0.0)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale, err_msg=path)


@functools.partial(quick_jit, static_argnames="implementation")
def everything(mixture, stacked, cotangent, implementation):
    """All that an implementation computes.

    Small matrices, stacked draws and gradients, one more density.
    """
    small = woodbury.grams(mixture, implementation=implementation)
    # a draw goes to the gradient of the same name where there is one
    has_gradient = implementation in OPS["mixture_grad"].implementations

    def one(noise):
        drawn = woodbury.draw(mixture, small, noise, implementation=implementation)
        gradients = {
            metric: mixture_grad.pullback(
                mixture,
                small,
                noise,
                drawn,
                cotangent,
                metric=metric,
                implementation=implementation if has_gradient else None,
            )
            for metric in mixture_grad.METRICS
        }
        if implementation == "reference":
            factors = {
                metric: gradient_reference.dense(mixture, small, noise, cotangent, metric).factors
                for metric in gradients
            }
        else:
            factors = {
                metric: gradient.factors(noise, mixture.log_weights.size)
                for metric, gradient in gradients.items()
            }
        return {"draw": drawn, "gradient": gradients, "factors": factors}

    elsewhere = woodbury.log_prob(
        mixture, small, stacked.eps[0] + 0.3, implementation=implementation
    )
    return {"grams": small, **jax.vmap(one)(stacked), "log_prob": elsewhere}


def arguments(name, dtype):
    mixture, stacked = cases.make(cases.CASES[name], jnp.dtype(dtype))
    cotangent = np.float32(np.cos(1.0 + np.arange(mixture.log_scale.size)))
    return mixture, stacked, jnp.asarray(cotangent, dtype)


@functools.cache
def evaluated(name, implementation, dtype="float64"):
    with enable_x64(dtype == "float64"):
        results = everything(*arguments(name, dtype), implementation=implementation)
        return jax.tree_util.tree_map(np.asarray, results)


@functools.cache
def sensitivity(name):
    """How far the results move when the inputs move in their 24th bit.

    What no float32 code can beat.
    """
    largest = jax.tree_util.tree_map(np.zeros_like, evaluated(name, "reference"))
    with enable_x64(True):
        inputs = jax.tree_util.tree_map(np.asarray, arguments(name, "float64"))
        for seed in range(6):
            rng = np.random.default_rng(seed)

            def nudge(leaf, rng=rng):
                return (
                    leaf * (1 + rng.choice([-1, 1], leaf.shape) * 2.0**-24)
                    if leaf.dtype.kind == "f"
                    else leaf
                )

            moved = everything(*jax.tree_util.tree_map(nudge, inputs), implementation="reference")
            largest = jax.tree_util.tree_map(
                lambda most, new, old: np.maximum(most, np.max(np.abs(new - old), initial=0.0)),
                largest,
                jax.tree_util.tree_map(np.asarray, moved),
                evaluated(name, "reference"),
            )
    return largest


def natural_scale(name, path, value):
    """The size that the error of a leaf is measured by.

    Its largest entry, or what it is computed from.
    """
    largest = np.max(np.abs(value), initial=0.0)
    if "responsibilities" in path:  # differences of log densities
        return max(1.0, np.max(np.abs(evaluated(name, "reference")["draw"].log_prob)))
    return largest


def test_every_op_is_tested():
    folders = {path.parent.name for path in Path(kernels.__file__).parent.glob("*/api.py")}
    assert folders == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_unknown_implementation_is_refused(op):
    assert {"reference", "xla"} <= set(OPS[op].implementations)
    with pytest.raises(ConfigError, match=f"{op}.*reference.*xla.*'cuda'"):
        OPS[op].select("cuda")


def test_an_implementation_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    absent = Implementation("nowhere", packages=("a_package_of_no_one",), extra="cuda")
    elsewhere = Implementation("nowhere", platforms=("tpu",))
    removed = Implementation("nowhere", packages=("jax.experimental.no_such_part",))
    others = {"absent": absent, "elsewhere": elsewhere, "removed": removed}
    op = Op("woodbury", {**OPS["woodbury"].implementations, **others})
    with pytest.raises(
        ConfigError, match=r"'absent'.*a_package_of_no_one: pip install 'fastvi\[cuda\]'"
    ):
        op.select("absent")
    with pytest.raises(
        ConfigError, match=f"'elsewhere'.*runs on tpu, and this machine has {current_platform()}"
    ):
        op.select("elsewhere")
    with pytest.raises(ConfigError, match="'removed'.*no_such_part, which this jax does not have"):
        op.select("removed")


def test_the_default_follows_the_platform_that_the_program_is_for(x64):
    op = OPS["mixture_grad"]._replace(defaults={"cuda": "reference"})
    rng = np.random.default_rng(0)
    factors, left, right = (
        jnp.asarray(rng.normal(size=size)) for size in ((2, 3, 5), (1, 1, 3), (1, 1, 5))
    )
    arguments = (factors, jnp.asarray([1]), left, right)

    def run(*arguments):
        return op.call("update_factors", None, *arguments)[0]

    expected = factors.at[1].add(left[0, 0][:, None] * right[0, 0])
    np.testing.assert_allclose(jax.jit(run)(*arguments), expected, rtol=1e-12)
    cpu, cuda = (
        jax.jit(run).trace(*arguments).lower(lowering_platforms=(name,)).as_text()
        for name in ("cpu", "cuda")
    )
    # the reference sums over components where xla updates one in place
    assert "dynamic_update_slice" in cpu
    assert "dynamic_update_slice" not in cuda


def test_show_says_what_runs_and_why(monkeypatch):
    monkeypatch.setattr(registry, "current_platform", lambda: "cpu")
    file = io.StringIO()
    kernels.show(file)
    lines = file.getvalue().splitlines()
    assert lines[0] == "platform cpu"
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, implementation] for name, op in OPS.items() for implementation in op.implementations
    ]
    assert all("runs by default on cpu" in line for line in lines[1:] if line.split()[1] == "xla")
    assert all("cannot run: it " in line for line in lines[1:] if line.split()[1] == "pallas")


@pytest.mark.as_users_compile
@pytest.mark.parametrize("implementation", available("mixture_grad"))
@given(
    comp=st.integers(1, 4),
    rank=st.integers(0, 5),
    dim=st.sampled_from([1, 5, 33]),
    terms=st.integers(1, 3),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    label_type=st.sampled_from([np.int32, np.int64]),
)
@settings(max_examples=12, deadline=None)
def test_update_factors(implementation, comp, rank, dim, terms, labels, label_type):
    labels, rng = np.asarray(labels, label_type) % comp, np.random.default_rng(comp + 10 * rank)
    sizes = (comp, rank, dim), (len(labels), terms, rank), (len(labels), terms, dim)
    with enable_x64(True):
        arguments = [jnp.asarray(rng.normal(size=size)) for size in sizes]
        arguments.insert(1, jnp.asarray(labels))
        actual, expected = (
            quick_jit(functools.partial(mixture_grad.update_factors, implementation=name))(
                *arguments
            )
            for name in (implementation, "reference")
        )
    assert_leaves_close(actual, expected, 1e-12)


def factor_update(chains, rank, dim=2300, blocks=2):
    rng = np.random.default_rng(rank)
    sizes = (*chains, 3, rank, dim), (*chains, blocks, 1, rank), (*chains, blocks, 1, dim)
    factors, left, right = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    return factors, jnp.asarray(rng.integers(0, 3, (*chains, blocks))), left, right


@pytest.mark.parametrize("chains", [(2,), (5,), (2, 3)])
def test_update_factors_over_chains_is_that_of_each(chains):
    arguments = factor_update(chains, 3)
    update = mixture_grad.update_factors
    for _ in chains:
        update = jax.vmap(update)
    moved, grams = map(np.asarray, quick_jit(update)(*arguments))
    arguments = [np.asarray(leaf) for leaf in arguments]
    each = quick_jit(gradient_reference.update_factors)
    for chain in np.ndindex(*chains):
        expected = each(*(leaf[chain] for leaf in arguments))
        assert_leaves_close((moved[chain], grams[chain]), expected, 2e-4)


@pytest.mark.parametrize(
    ("chains", "rank", "blocks"), [((1,), 2, 1), ((1,), 8, 2), ((3,), 2, 2), ((2, 2), 8, 2)]
)
def test_update_factors_copies_no_factors_in_a_loop(chains, rank, blocks, fully_optimised):
    update = mixture_grad.update_factors
    for _ in chains:
        update = jax.vmap(update)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(factors, labels, left, right):
        def body(factors, _):
            # what a step reads of the factors decides what it adds to them
            shift = jnp.mean(factors, axis=(-3, -2, -1))[..., None, None, None]
            return update(factors, labels, left + shift, right)

        return jax.lax.scan(body, factors, length=4)

    arguments = factor_update(chains, rank, blocks=blocks)
    text = run.lower(*arguments).compile().as_text()
    assert not re.findall(rf"= f32\[(?:\d+,)*{rank},{arguments[0].shape[-1]}\]\S* copy\(.*", text)


@pytest.mark.parametrize(
    ("name", "implementation"), by_implementation(cases.CASES, "shared", "component_masked")
)
def test_mixture_agrees_with_dense_algebra(name, implementation):
    # the dense side solves with P of condition 1e7 and multiplies by it again: 16 - 7 digits
    tolerance = 3e-8 if "steep" in name else 1e-12
    for path, got, want in leaf_pairs(
        evaluated(name, implementation), evaluated(name, "reference")
    ):
        np.testing.assert_allclose(
            got, want, rtol=0, atol=tolerance * natural_scale(name, path, want), err_msg=path
        )


@pytest.mark.parametrize(
    ("name", "implementation"), by_implementation(FLOAT32, "shared", "component_masked")
)
def test_float32_is_as_accurate_as_its_inputs(name, implementation):
    # 4e-6: a few roundings of the largest term; beyond it only what a change of the last input bit
    # can do, which is up to |b| = 3e3 times more in steep directions (B A_m^T cancels), whatever
    # the algorithm.
    expected, moved = evaluated(name, "reference"), jax.tree_util.tree_leaves(sensitivity(name))
    pairs = leaf_pairs(evaluated(name, implementation, "float32"), expected)
    for (path, got, want), shift in zip(pairs, moved, strict=True):
        assert got.dtype == np.float32
        slack = 4e-6 * natural_scale(name, path, want) + 2 * np.max(shift, initial=0.0)
        # P^{1/2} scales the natural gradient of a core row: an error of 1e-7 in l is |b| times
        # larger there
        if "steep" in name and "natural" in path:
            slack *= 4
        np.testing.assert_allclose(got, want, rtol=0, atol=slack, err_msg=path)


@pytest.mark.parametrize(("name", "implementation"), by_implementation(FLOAT32_LIMITS))
def test_float32_limits(name, implementation):
    """Factors across steep directions, which a fit avoids.

    The gram matrix squares their condition.
    """
    expected, actual = (
        evaluated(name, "reference")["draw"],
        evaluated(name, implementation, "float32")["draw"],
    )
    nats = np.max(np.abs(actual.log_prob - expected.log_prob))
    score = np.max(np.abs(actual.score - expected.score)) / np.max(np.abs(expected.score))
    assert (nats, score) <= FLOAT32_LIMITS[name]


@pytest.mark.parametrize(
    ("name", "implementation"),
    by_implementation(
        ["one_dimension", "core_only", "seeds", "wide_rank", "shared_masked", "component_masked"]
    ),
)
def test_natural_gradient_is_the_dense_metric_times_the_euclidean(name, implementation):
    mixture = jax.tree_util.tree_map(np.float64, cases.make(cases.CASES[name])[0])
    gradient = evaluated(name, implementation)["gradient"]
    precision = np.eye(mixture.log_scale.size) + mixture.core.T @ mixture.core
    covariance, euclidean, natural = (
        np.linalg.inv(precision),
        gradient["euclidean"],
        gradient["natural"],
    )
    expected = euclidean._replace(
        offsets=euclidean.offsets * np.exp(mixture.log_scale) @ covariance,
        # moving log_scale moves the core along, so that core D^{-1/2} stays
        log_scale=euclidean.log_scale + np.sum(mixture.core * euclidean.core, axis=-2),
        core=euclidean.core @ precision,
        factor=euclidean.factor @ covariance,
    )
    assert_leaves_close(natural, expected, 1e-12)


@pytest.mark.parametrize(("prefix", "implementation"), by_implementation(["shared", "component"]))
def test_vmap_over_chains_equals_a_loop(prefix, implementation, x64):
    names = [prefix, f"{prefix}_masked", f"{prefix}_steep"]
    stacked = jax.tree_util.tree_map(
        lambda *leaves: np.stack(leaves), *(arguments(name, "float64") for name in names)
    )
    together = jax.vmap(functools.partial(everything, implementation=implementation))(*stacked)
    together = jax.tree_util.tree_map(np.asarray, together)
    for index, name in enumerate(names):
        alone = evaluated(name, implementation)
        # condition 1e7 times a different order of summation
        tolerance = 1e-8 if "steep" in name else 1e-12
        assert_leaves_close(
            jax.tree_util.tree_map(lambda leaf, i=index: leaf[i], together), alone, tolerance
        )


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("shared", "reference"),
        ("component", "reference"),
        *by_implementation(["shared", "component"]),
    ],
)
def test_nan_in_nan_out(name, implementation, x64):
    mixture, stacked, cotangent = arguments(name, "float64")
    for field in mixture._fields:
        # the last component: not the one drawn first, so that its NaN comes in by the density alone
        spoiled = mixture._replace(**{field: with_nan(getattr(mixture, field), -1)})
        drawn = everything(spoiled, stacked, cotangent, implementation=implementation)
        # log_prob of a draw does not depend on the mean that all components share; its place does
        hit = (
            drawn["draw"].displacement
            if field == "offsets" and name == "shared"
            else drawn["draw"].score
        )
        assert np.all(np.isnan(hit).any(axis=-1)), field
        assert np.isnan(drawn["log_prob"]), field
    for field in ("eps", "zeta", "z"):
        spoiled = stacked._replace(**{field: with_nan(getattr(stacked, field), (0, 0))})
        drawn = everything(mixture, spoiled, cotangent, implementation=implementation)["draw"]
        drawn = jax.tree_util.tree_map(np.asarray, drawn)
        assert np.isnan(drawn.log_prob[0]), field
        assert np.isnan(drawn.displacement[0]).any(), field
        assert np.isfinite(drawn.log_prob[1]), field
    gradient = everything(mixture, stacked, with_nan(cotangent, 0), implementation=implementation)[
        "gradient"
    ]
    for metric in mixture_grad.METRICS:
        for field in ("offsets", "log_scale", "core", "factor"):
            assert np.isnan(getattr(gradient[metric], field)).any(), (metric, field)


@pytest.mark.parametrize("name", ["shared_masked", "component_masked"])
def test_log_prob_can_be_differentiated(name, x64):
    mixture, stacked, _ = arguments(name, "float64")
    point = stacked.eps[0] + 0.3

    def gradient(implementation):
        def log_prob(mixture, point):
            small = woodbury.grams(mixture, implementation=implementation)
            return woodbury.log_prob(mixture, small, point, implementation=implementation)

        return quick_jit(jax.grad(log_prob, argnums=(0, 1)))(mixture, point)

    assert_leaves_close(gradient("xla"), gradient("reference"), 1e-11)


@settings(max_examples=6)
@given(
    num_components=st.integers(1, 3),
    rank=st.integers(0, 3),
    num_core=st.integers(0, 3),
    dim=st.integers(1, 6),
    means=st.sampled_from(["center", "shared", "component"]),
)
def test_draws_have_the_mixture_s_density(num_components, rank, num_core, dim, means):
    num_offsets = {"center": 0, "shared": 1, "component": num_components}[means]
    with enable_x64(True):
        mixture, stacked = cases.make(
            cases.Case(num_components, rank, num_core, dim, num_offsets), jnp.float64
        )

        @quick_jit
        def draw(mixture, stacked):
            small = woodbury.grams(mixture)
            return jax.vmap(lambda noise: woodbury.draw(mixture, small, noise))(stacked)

        drawn = draw(mixture, stacked)
    mixture, drawn = jax.tree_util.tree_map(np.asarray, (mixture, drawn))
    locations = np.broadcast_to(
        mixture.offsets.sum(0) if num_offsets == 0 else mixture.offsets, (num_components, dim)
    )
    scale, inner = (
        np.exp(mixture.log_scale),
        np.linalg.inv(np.eye(dim) + mixture.core.T @ mixture.core),
    )
    covariances = [
        scale[:, None] * (inner + factor.T @ factor) * scale for factor in mixture.factors
    ]
    for index, point in enumerate(drawn.displacement):
        parts = np.array(
            [
                weight + scipy.stats.multivariate_normal(mean, covariance).logpdf(point)
                for weight, mean, covariance in zip(
                    mixture.log_weights, locations, covariances, strict=True
                )
            ]
        )
        share = np.exp(parts - scipy.special.logsumexp(parts))
        pulls = [np.linalg.solve(c, m - point) for m, c in zip(locations, covariances, strict=True)]
        np.testing.assert_allclose(
            drawn.log_prob[index], scipy.special.logsumexp(parts), rtol=1e-11
        )
        np.testing.assert_allclose(drawn.responsibilities[index], share, atol=1e-11)
        np.testing.assert_allclose(drawn.score[index], share @ pulls, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_responsibilities_keep_their_digits_in_high_dimension(implementation):
    dim, rng, results = 100_000, np.random.default_rng(0), []
    factors = 0.5 * rng.normal(size=(3, 2, dim)) / np.sqrt(dim)
    eps, z = rng.normal(size=dim), rng.normal(size=2)

    @quick_jit
    def responsibilities(factors, eps, z):
        zeros, dtype = jnp.zeros((0, dim), eps.dtype), eps.dtype
        mixture = Mixture(
            jnp.log(jnp.full(3, 1 / 3, dtype)), zeros, jnp.zeros(dim, dtype), zeros, factors
        )
        small = woodbury.grams(mixture, implementation=implementation)
        one = woodbury.Noise(jnp.asarray(0), eps, jnp.zeros(0, dtype), z)
        return woodbury.draw(mixture, small, one, implementation=implementation).responsibilities

    for dtype in ("float32", "float64"):
        with enable_x64(dtype == "float64"):
            cast = [jnp.asarray(np.float32(array), dtype) for array in (factors, eps, z)]
            results.append(np.asarray(responsibilities(*cast)))
    np.testing.assert_allclose(*results, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_log_density_keeps_its_digits_at_a_million_dimensions(implementation):
    dim, rng = 1_000_000, np.random.default_rng(1)
    factors = (rng.normal(size=(2, 3, dim)) / np.sqrt(dim)).astype(np.float32)
    log_scale, eps = (rng.normal(size=dim).astype(np.float32) for _ in range(2))
    zeros, weights = np.zeros((0, dim), np.float32), np.log(np.full(2, 0.5, np.float32))
    mixture = Mixture(weights, zeros, 0.3 * log_scale, zeros, factors)
    noise = woodbury.Noise(np.int32(1), eps, np.zeros(0, np.float32), np.ones(3, np.float32))
    drawn = jax.jit(
        lambda mixture, noise: woodbury.draw(
            mixture,
            woodbury.grams(mixture, implementation=implementation),
            noise,
            implementation=implementation,
        )
    )(*jax.tree_util.tree_map(jnp.asarray, (mixture, noise)))
    # in float64, by the matrix determinant lemma and Woodbury's identity, at the point as drawn
    x = np.float64(drawn.displacement) / np.exp(np.float64(mixture.log_scale))
    parts = []
    for factor in np.float64(factors):
        small, projected = np.eye(3) + factor @ factor.T, factor @ x
        quadratic = x @ x - projected @ np.linalg.solve(small, projected)
        log_det = 2 * np.sum(np.float64(mixture.log_scale)) + np.linalg.slogdet(small)[1]
        parts.append(np.log(0.5) - 0.5 * (quadratic + log_det + dim * np.log(2 * np.pi)))
    np.testing.assert_allclose(float(drawn.log_prob), scipy.special.logsumexp(parts), rtol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("rank", "dim"), [(0, 3), (1, 5), (2, 3), (3, 7), (4, 1000), (3, 2345), (2, 1001)]
)
def test_factor_grams(rank, dim, implementation, x64):
    factors = jnp.asarray(np.random.default_rng(0).normal(size=(2, rank, dim)))
    products = quick_jit(functools.partial(woodbury.factor_grams, implementation=implementation))(
        factors
    )
    np.testing.assert_allclose(
        products, np.einsum("mrd,msd->mrs", factors, factors), rtol=1e-12, atol=1e-11
    )
    # and they are used, not recomputed
    mixture = Mixture(np.zeros(2), np.zeros((0, dim)), np.zeros(dim), np.zeros((0, dim)), factors)
    small = quick_jit(functools.partial(woodbury.grams, implementation=implementation))(
        mixture, 3 * products
    )
    whitened = (
        small.factor_half
        @ (np.eye(rank) + 3 * np.asarray(products))
        @ np.swapaxes(small.factor_half, 1, 2)
    )
    np.testing.assert_allclose(whitened, np.broadcast_to(np.eye(rank), whitened.shape), atol=1e-10)


def test_an_accelerator_multiplies_factors_without_a_loop():
    factors = jnp.ones((2, 3, 2500))

    def lowered(platform):
        products = jax.jit(woodbury.factor_grams)
        return products.trace(factors).lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.while" in lowered("cpu")
    assert "stablehlo.while" not in lowered("cuda")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_upper_median(size, dtype):
    values = np.abs(np.random.default_rng(size).normal(size=size))
    values[: size // 3] *= 1e-20
    with enable_x64(dtype == "float64"):
        values = jnp.asarray(values, dtype)
        assert upper_median(values) == jnp.sort(values)[size // 2]
        assert np.isnan(upper_median(jnp.full(size, jnp.nan, dtype)))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 8, 33])
def test_lower_inverse(size, x64):
    matrix = np.tril(np.random.default_rng(size).normal(size=(3, size, size)), -1) + 2 * np.eye(
        size
    )
    lower_inverse = quick_jit(triangular.lower_inverse)
    inverse = np.asarray(lower_inverse(matrix))
    np.testing.assert_allclose(
        inverse @ matrix, np.broadcast_to(np.eye(size), matrix.shape), atol=1e-10
    )
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix), rtol=1e-9, atol=1e-9)
    assert np.all(np.triu(inverse, 1) == 0)
    if size > 1:
        matrix[0, 1, 0] = np.nan
        spoiled = lower_inverse(matrix)
        assert np.isnan(spoiled[0]).any()
        assert np.isfinite(spoiled[1:]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("implementation", HUTCHINSON)
@pytest.mark.parametrize("name", also_as_users_compile(hutchinson_cases.CASES, "ragged", "steep"))
def test_hutchinson_agrees_with_the_dense_matrix(name, implementation, dtype):
    case = hutchinson_cases.CASES[name]
    with enable_x64(dtype == "float64"):
        matrix, probes = hutchinson_cases.make(case, jnp.dtype(dtype))
        options = {"implementation": implementation}

        @quick_jit
        def both(matrix, probes):
            operators = hutchinson.diagonal, hutchinson.trace_samples
            return [operator(lambda z: matrix @ z, probes, **options) for operator in operators]

        diagonal, samples = map(np.float64, both(matrix, probes))
    matrix, probes = np.float64(matrix), np.float64(probes)
    size = np.abs(matrix).sum(axis=1)
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    assert np.all(
        np.abs(diagonal - np.mean(probes * (probes @ matrix), axis=0)) <= tolerance * size
    )
    assert np.all(
        np.abs(samples - np.sum(probes * (probes @ matrix), axis=1)) <= tolerance * size.sum()
    )
    if case.diagonal:
        np.testing.assert_allclose(diagonal, np.diag(matrix), rtol=tolerance)
        np.testing.assert_allclose(
            samples, np.trace(matrix), rtol=tolerance, atol=tolerance * size.sum()
        )


@pytest.mark.parametrize("implementation", ["reference", *HUTCHINSON])
def test_hutchinson_is_exact_over_all_probes(implementation):
    matrix = np.array([[2.0, 3.0, -1.0], [3.0, -5.0, 4.0], [-1.0, 4.0, 0.5]], np.float32)
    probes = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=3)))
    options = {"implementation": implementation}
    np.testing.assert_allclose(
        hutchinson.diagonal(lambda z: matrix @ z, probes, **options), np.diag(matrix), atol=1e-6
    )
    samples = hutchinson.trace_samples(lambda z: matrix @ z, probes, **options)
    np.testing.assert_allclose(np.mean(samples), np.trace(matrix), atol=1e-6)


def test_rademacher_is_plus_or_minus_one():
    probes = np.asarray(hutchinson.rademacher(jax.random.key(0), 100, 50))
    assert probes.shape == (100, 50)
    assert set(np.unique(probes)) == {-1.0, 1.0}
    assert abs(probes.mean()) < 4 / np.sqrt(probes.size)
    assert np.max(np.abs(np.corrcoef(probes.T) - np.eye(50))) < 0.5


def bits(array):
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 0), (1025,), (4, 3, 33)])
def test_noise_has_the_bits_of_jax(shape, dtype):
    with enable_x64(dtype == "float64"):
        for key in (
            jax.random.key(0),
            jax.random.fold_in(jax.random.key(2**31), 5),
            jax.random.PRNGKey(3),
        ):
            actual, expected = (
                noise.normal(key, shape, jnp.dtype(dtype)),
                jax.random.normal(key, shape, dtype),
            )
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(bits(actual), bits(expected))


@pytest.mark.as_users_compile
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_has_the_bits_of_jax_over_chains_and_implementations(dtype):
    with enable_x64(dtype == "float64"):
        keys = jax.random.split(jax.random.key(7), 3)
        actual = jax.jit(jax.vmap(lambda key: noise.normal(key, (2, 11), jnp.dtype(dtype))))(keys)
        expected = jax.jit(jax.vmap(lambda key: jax.random.normal(key, (2, 11), dtype)))(keys)
        np.testing.assert_array_equal(bits(actual), bits(expected))
        key = jax.random.key(1, impl="rbg")
        np.testing.assert_array_equal(
            noise.normal(key, (9,), jnp.dtype(dtype)), jax.random.normal(key, (9,), dtype)
        )
        many = noise.normal(jax.random.key(11), (100_000,), jnp.dtype(dtype))
        np.testing.assert_array_equal(
            bits(many), bits(jax.random.normal(jax.random.key(11), (100_000,), dtype))
        )
