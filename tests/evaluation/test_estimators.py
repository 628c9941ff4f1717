import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvi.evaluation.control_variate import hessian_columns, regress
from fastvi.evaluation.llc import (
    Beside,
    error_over_pieces,
    evaluate,
    evaluation_draws,
    full_losses_at,
    losses_at,
    losses_beside,
)
from fastvi.families.mfa import MFA, MFAParams
from fastvi.kernels.noise import streams
from fastvi.target.data import Problem, hold
from fastvi.target.objective import make_flat_objective
from fastvi.target.posterior import LocalPosterior

pytestmark = pytest.mark.usefixtures("x64")
DIM, NBETA, GAMMA = 4, 40.0, 3.0
NUM_KEYS, NUM_DRAWS = 200, 64


def z_score(samples, expected):
    samples = np.asarray(samples)
    return (samples.mean() - expected) / (samples.std(ddof=1) / np.sqrt(samples.size))


# The regression.


def synthetic(seed, units=24, slope=(2.0, -3.0), noise=0.1):
    """Values of mean 5 with two columns of mean zero, one of them skewed."""
    rng = np.random.default_rng(seed)
    columns = np.stack([rng.normal(size=units), 1e-3 * (rng.exponential(size=units) - 1)], -1)
    values = (
        5
        + columns @ [slope[0], slope[1] * 1e3]
        + noise * rng.normal(size=units)
        + 0.2 * columns[:, 0] ** 2
        - 0.2
    )
    return values, columns


regressed = jax.jit(regress)


def test_regression_is_unbiased_and_cuts_the_variance():
    values, columns = map(np.stack, zip(*(synthetic(seed) for seed in range(2000)), strict=True))
    fit = jax.jit(jax.vmap(regress))(values, columns)
    assert abs(z_score(fit.mean, 5.0)) < 3.5
    plain, corrected = np.var(values.mean(1)), np.var(fit.mean)
    assert plain / corrected > 20
    # the stated error is the error: residual variance over the number of units
    assert 0.85 < np.mean(fit.residual_variance) / 24 / corrected < 1.25
    np.testing.assert_allclose(np.mean(fit.coefficients, axis=0), [2.0, -3e3], rtol=0.02)


def test_regression_leaves_nothing_of_an_exact_fit():
    values, columns = synthetic(0)
    fit = regressed(7 + columns @ [1.0, 500.0], columns)
    np.testing.assert_allclose(fit.mean, 7, rtol=1e-10)
    np.testing.assert_allclose(fit.coefficients, [1.0, 500.0], rtol=1e-8)
    assert fit.residual_variance < 1e-18


def test_regression_uses_the_other_half_s_coefficients():
    values, columns = synthetic(1)
    fit = regressed(values, columns)

    def coefficients(part):
        design = np.column_stack([np.ones(12), columns[part]])
        return np.linalg.lstsq(design, values[part], rcond=None)[0][1:]

    halves = slice(0, 12), slice(12, 24)
    residual = [values[a] - columns[a] @ coefficients(b) for a, b in (halves, halves[::-1])]
    np.testing.assert_allclose(fit.mean, np.mean(residual), rtol=1e-10)
    np.testing.assert_allclose(
        fit.residual_variance, np.var(np.concatenate(residual), ddof=1), rtol=1e-9
    )


def test_regression_copes_with_useless_columns():
    values, columns = synthetic(2)
    collinear = np.concatenate([columns, 3 * columns[:, :1], np.zeros((24, 1))], axis=1)
    np.testing.assert_allclose(
        regressed(values, collinear).mean, regressed(values, columns).mean, rtol=1e-9
    )
    none = regressed(values, columns[:, :0])
    np.testing.assert_allclose(none.mean, values.mean(), rtol=1e-12)
    np.testing.assert_allclose(none.residual_variance, np.var(values, ddof=1), rtol=1e-12)
    few = regressed(values[:8], columns[:8])
    np.testing.assert_allclose(few.mean, values[:8].mean(), rtol=1e-12)
    np.testing.assert_array_equal(few.coefficients, 0)


# The estimate on a target whose answer is known.


@functools.cache
def family(means):
    rng = np.random.default_rng(1)
    q = MFA(
        scale=jnp.asarray([0.1, 0.2, 0.3, 0.15]),
        core_mask=jnp.ones(2),
        lr_factor=jnp.ones(()),
        ranks=(2, 1),
        means=means,
        noise_size=2,
    )
    params = MFAParams(
        logits=jnp.asarray([0.4, -0.3]),
        offsets=jnp.asarray(0.5 * rng.normal(size=(q.num_offsets, DIM))),
        log_scale=jnp.asarray(0.3 * rng.normal(size=DIM)),
        core=jnp.asarray(rng.normal(size=(2, DIM))),
        factors=jnp.asarray(0.5 * rng.normal(size=(2, 2, DIM))),
    )
    return q, params


def second_moment(q, params):
    """E_q[v v^T] by dense algebra."""
    inner = np.linalg.inv(np.eye(DIM) + params.core.T @ params.core)
    deviation = np.asarray(q.scale * jnp.exp(params.log_scale))
    weights = np.exp(params.logits) / np.exp(params.logits).sum()
    total = np.zeros((DIM, DIM))
    for m, rank in enumerate(q.ranks):
        factor = np.asarray(params.factors[m, :rank])
        offsets = (
            np.zeros(DIM)
            if q.means == "center"
            else params.offsets[m if q.means == "component" else 0]
        )
        mean = np.asarray(q.scale * offsets)
        total += weights[m] * (
            deviation[:, None] * (inner + factor.T @ factor) * deviation + np.outer(mean, mean)
        )
    return total


def dense_hessian(seed=3):
    root = np.random.default_rng(seed).normal(size=(DIM, DIM))
    return jnp.asarray(root @ root.T + np.diag([0.0, 1.0, 2.0, 3.0]))


def problem_for(loss):
    center = jnp.asarray([1.0, -2.0, 0.5, 3.0])
    posterior = LocalPosterior(center, jnp.asarray(NBETA), jnp.asarray(GAMMA))
    problem = Problem(posterior, hold(jnp.zeros((3, 1))), batch_size=3)
    return make_flat_objective(lambda w, batch: loss(w - center) + 0 * jnp.mean(batch)), problem


@functools.partial(jax.jit, static_argnums=3)
def evaluate_polynomial(q, params, polynomial, control_variate, keys):
    """Evaluate on offset + slope .

    v + v . H v / 2 + quartic |v|_4^4: one program for all its coefficients.
    """

    def loss(v):
        hessian, slope, offset, quartic = polynomial
        return offset + slope @ v + 0.5 * v @ hessian @ v + quartic * jnp.sum(v**4)

    objective, problem = problem_for(loss)
    options = {"control_variate": control_variate, "trace_probes": 64}
    return jax.vmap(
        lambda key: evaluate_at_draws(q, params, objective, problem, key, NUM_DRAWS, **options)
    )(keys)


def evaluate_at_draws(q, params, objective, problem, key, num_draws, **options):
    draws = evaluation_draws(q, params, key, num_draws)
    center = problem.posterior.center
    losses = losses_at(objective, center, draws.displacement, problem.data.examples)
    return evaluate(q, params, objective, problem, draws, losses, key, **options)


def evaluations(q, params, control_variate, hessian, slope=(0.0,) * DIM, offset=0.0, quartic=0.0):
    polynomial = jnp.asarray(hessian), jnp.asarray(slope), jnp.asarray(offset), jnp.asarray(quartic)
    keys = jax.random.split(jax.random.key(0), NUM_KEYS)
    return evaluate_polynomial(q, params, polynomial, control_variate, keys)


@pytest.mark.parametrize("means", ["shared", "component"])
@pytest.mark.parametrize("control_variate", ["auto", "hvp", "none"])
def test_llc_is_unbiased_where_q_is_wrong(control_variate, means):
    q, params = family(means)
    hessian, slope = dense_hessian(), jnp.asarray([0.3, -0.2, 0.1, 0.4])
    # at an offset of 5 nats, and with a slope at w*: differences are paired, odd terms have mean b
    # . E[v]
    result = evaluations(q, params, control_variate, hessian, slope, offset=5.0)
    weights = jax.nn.softmax(params.logits)
    mean = q.scale * (weights @ params.offsets if means == "component" else params.offsets[0])
    exact = NBETA * (0.5 * np.trace(hessian @ second_moment(q, params)) + slope @ mean)
    assert abs(z_score(result.llc_mc, exact)) < 3
    if control_variate == "hvp" and means == "shared":
        # q's factors span all four dimensions: the trace is exact, and mirrored draws leave the
        # slope its mean
        np.testing.assert_allclose(result.llc, exact, rtol=1e-8)
        return
    assert abs(z_score(result.llc, exact)) < 3
    # the error that is stated is the error
    assert 0.75 < np.mean(result.llc_sem**2) / np.var(result.llc) < 1.35
    reduction = np.var(result.llc_mc) / np.var(result.llc)
    if control_variate == "none":
        np.testing.assert_allclose(result.llc, result.llc_mc, rtol=1e-12)
        np.testing.assert_allclose(result.variance_reduction, 1.0, rtol=1e-9)
    else:
        assert reduction > (2 if control_variate == "hvp" else 0.8)
        assert 0.5 < np.median(result.variance_reduction) / reduction < 2


def test_elbo_is_log_density_minus_log_q():
    q, params = family("shared")
    hessian = dense_hessian()
    result = evaluations(q, params, "none", hessian, offset=0.7)
    sample = jax.jit(
        lambda key: q.sample(params, key, NUM_DRAWS, antithetic=True, block=streams.EVALUATION)
    )
    draws = [sample(key) for key in jax.random.split(jax.random.key(0), NUM_KEYS)[:3]]
    for index, draw in enumerate(draws):
        v = np.asarray(draw.displacement)
        excess = 0.5 * np.einsum("ni,ij,nj->n", v, hessian, v)
        weight = -NBETA * (0.7 + excess) - 0.5 * GAMMA * np.sum(v**2, -1) - draw.log_prob
        np.testing.assert_allclose(result.excess[index], excess, atol=1e-12)
        np.testing.assert_allclose(result.log_weight[index], weight, rtol=1e-10)
        np.testing.assert_allclose(result.elbo[index], weight.mean(), rtol=1e-10)
        np.testing.assert_allclose(result.log_weight_sd[index], weight.std(ddof=1), rtol=1e-8)


def laplace(hessian):
    """The family's exact posterior of a quadratic.

    No factors, all directions but one in the core.
    """
    values, vectors = np.linalg.eigh(NBETA * np.asarray(hessian) + GAMMA * np.eye(DIM))
    core = (np.sqrt(values[1:] / values[0] - 1) * vectors[:, 1:]).T
    q = MFA(
        scale=jnp.full(DIM, values[0] ** -0.5),
        core_mask=jnp.ones(DIM - 1),
        lr_factor=jnp.ones(()),
        ranks=(0,),
        means="shared",
        noise_size=DIM - 1,
    )
    params = MFAParams(
        jnp.zeros(1), jnp.zeros((1, DIM)), jnp.zeros(DIM), jnp.asarray(core), jnp.zeros((1, 0, DIM))
    )
    return q, params


@pytest.mark.parametrize("control_variate", ["auto", "hvp"])
def test_variance_falls_near_a_quadratic(control_variate):
    hessian = dense_hessian()
    q, params = laplace(hessian)
    result = evaluations(q, params, control_variate, hessian)
    covariance = np.linalg.inv(NBETA * hessian + GAMMA * np.eye(DIM))
    # lambda = 1/2 sum n beta h / (n beta h + gamma), and elbo = log Z at the exact posterior
    exact = 0.5 * NBETA * np.trace(hessian @ covariance)
    assert abs(z_score(result.llc_mc, exact)) < 3
    log_z = 0.5 * DIM * np.log(2 * np.pi) + 0.5 * np.linalg.slogdet(covariance)[1]
    np.testing.assert_allclose(result.log_weight, log_z, rtol=1e-9)
    # q's own curvature spans the Hessian, and its factors all dimensions: nothing is left
    np.testing.assert_allclose(result.llc, exact, rtol=1e-8)
    # with a quartic part the columns no longer fit all of it
    bent = evaluations(q, params, control_variate, hessian, quartic=5.0)
    quartic = 5 * 3 * np.sum(np.diag(covariance) ** 2)
    assert abs(z_score(bent.llc, exact + NBETA * quartic)) < 3
    if control_variate == "auto":
        assert np.median(bent.variance_reduction) > 10
        assert np.var(bent.llc_mc) / np.var(bent.llc) > 10


@pytest.mark.parametrize("means", ["shared", "component"])
def test_trace_term_covers_the_whole_second_moment(means):
    """On a diagonal Hessian the probes are exact: no part of tr(H E[v v^T]) may be missing."""
    q, params = family(means)
    diagonal = jnp.asarray([1.0, 0.5, 3.0, -0.7])
    objective, problem = problem_for(lambda v: 0.5 * jnp.sum(diagonal * v**2))

    @jax.jit
    def run(q, params):
        draws = q.sample(params, jax.random.key(0), 6, antithetic=True)
        return draws, *hessian_columns(q, params, objective, problem, draws, jax.random.key(1), 3)

    draws, columns, expected, variance = run(q, params)
    exact = 0.5 * NBETA * np.sum(diagonal * np.diag(second_moment(q, params)))
    np.testing.assert_allclose(expected, [exact], rtol=1e-10)
    np.testing.assert_allclose(variance, [0.0], atol=1e-20)
    values = 0.5 * NBETA * np.sum(diagonal * draws.displacement**2, -1)
    np.testing.assert_allclose(columns[:, 0], values, rtol=1e-10)
    result = evaluations(q, params, "hvp", jnp.diag(diagonal))
    np.testing.assert_allclose(result.trace_term, exact, rtol=1e-8)
    np.testing.assert_allclose(result.llc, exact, rtol=1e-8)


def short(dim=DIM):
    """A q whose low-rank part, one row of core, leaves most directions to the probes."""
    rng = np.random.default_rng(4)
    q = MFA(
        scale=jnp.asarray(rng.uniform(0.1, 0.3, dim)),
        core_mask=jnp.ones(1),
        lr_factor=jnp.ones(()),
        ranks=(0,),
        means="center",
        noise_size=1,
    )
    core = jnp.asarray(3 * rng.normal(size=(1, dim)))
    return q, MFAParams(
        jnp.zeros(1), jnp.zeros((0, dim)), jnp.zeros(dim), core, jnp.zeros((1, 0, dim))
    )


@functools.cache
def short_draws():
    q, params = short()
    return jax.jit(lambda: q.sample(params, jax.random.key(0), 2, antithetic=True))()


@pytest.mark.parametrize("num_probes", [1, 8])
def test_probes_are_unbiased_and_know_their_error(num_probes):
    q, params = short()
    hessian, draws = dense_hessian(), short_draws()
    objective, problem = problem_for(lambda v: 0.5 * v @ hessian @ v)

    @jax.jit
    @jax.vmap
    def run(key):
        return hessian_columns(q, params, objective, problem, draws, key, num_probes)[1:]

    expected, variance = run(jax.random.split(jax.random.key(2), 500))
    exact = 0.5 * NBETA * np.trace(hessian @ second_moment(q, params))
    assert abs(z_score(expected[:, 0], exact)) < 3
    ratio = np.mean(variance) / np.var(expected)
    assert 0.8 < ratio < 1.25 if num_probes > 1 else ratio > 0.8  # a single probe knows a bound


def tanh_net(w, x):
    return jnp.tanh(x @ w[:12].reshape(4, 3) + w[12:15]) @ w[15:18] + w[18]


@pytest.mark.parametrize("rows", [1, 18])
def test_hvp_never_adds_variance(rows):
    """A tanh network, d = 19, far from a diagonal Hessian.

    Q is its Laplace approximation, or all but one row of it.
    """
    rng = np.random.default_rng(0)
    x, center = jnp.asarray(rng.normal(size=(60, 4))), jnp.asarray(rng.normal(size=19))
    y, nbeta = tanh_net(center, x) + 0.3 * jnp.asarray(rng.normal(size=60)), 20.0

    def loss(w, batch):
        return 5 * jnp.mean((tanh_net(w, batch[0]) - batch[1]) ** 2)

    objective = make_flat_objective(loss)
    posterior = LocalPosterior(center, jnp.asarray(nbeta), jnp.ones(()))
    problem = Problem(posterior, hold((x, y)), batch_size=60)
    jacobian = np.asarray(jax.jit(jax.jacobian(tanh_net))(center, x))
    values, vectors = np.linalg.eigh(10 * nbeta * jacobian.T @ jacobian / 60 + np.eye(19))
    core = (np.sqrt(values[1:] / values[0] - 1) * vectors[:, 1:]).T[-rows:]
    q = MFA(
        scale=jnp.full(19, values[18 - rows if rows < 18 else 0] ** -0.5),
        core_mask=jnp.ones(rows),
        lr_factor=jnp.ones(()),
        ranks=(0,),
        means="center",
        noise_size=rows,
    )
    params = MFAParams(
        jnp.zeros(1), jnp.zeros((0, 19)), jnp.zeros(19), jnp.asarray(core), jnp.zeros((1, 0, 19))
    )

    @jax.jit
    @jax.vmap
    def run(key):
        options = {"control_variate": "hvp", "trace_probes": 16}
        return evaluate_at_draws(q, params, objective, problem, key, 64, **options)

    keys = jax.random.split(jax.random.key(0), 200)
    hvp = run(keys)
    # the same draws: the means differ by what the columns took off, whose mean is zero
    assert abs(z_score(hvp.llc - hvp.llc_mc, 0.0)) < 3
    assert np.var(hvp.llc) <= np.var(hvp.llc_mc)
    assert 0.75 < np.mean(hvp.llc_sem**2) / np.var(hvp.llc) < 1.35


def test_a_given_full_loss_is_paired():
    objective, problem = problem_for(lambda v: 0.5 * v @ v)
    v, center = jnp.asarray([[1.0, 0.0, 2.0, 0.0]]), problem.posterior.center
    own = losses_at(objective, center, v, problem.data.examples)
    np.testing.assert_allclose(own.excess, [2.5], rtol=1e-12)
    np.testing.assert_allclose(own.slope, jnp.zeros(4), atol=1e-12)
    given, w = full_losses_at(lambda w: 10 * jnp.sum(w**2), center, v), center + v[0]
    np.testing.assert_allclose(given.excess, [10 * (w @ w - center @ center)], rtol=1e-12)
    np.testing.assert_allclose(given.reference, 10 * center @ center, rtol=1e-12)


def test_the_error_over_pieces_is_that_of_their_means():
    pieces = np.random.default_rng(2).normal(size=16)
    running = np.cumsum(pieces) / np.arange(1, 17)
    expected = np.std(pieces, ddof=1) / 4
    assert error_over_pieces(running.tolist()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("draws", [2, 6, 16, 26])
def test_losses_at_draws_are_exact_and_hold_the_model_once(draws):
    rng = np.random.default_rng(draws)
    x, center, v = rng.normal(size=(9, 3)), rng.normal(size=3), rng.normal(size=(draws, 3))
    objective = make_flat_objective(lambda w, batch: jnp.mean(jnp.tanh(batch @ w)))
    program = jax.jit(lambda *arguments: losses_at(objective, *arguments))
    arguments = tuple(map(jnp.asarray, (center, v, x)))
    found, at_center = program(*arguments), np.tanh(x @ center)
    mean = np.mean(np.tanh((center + v) @ x.T), axis=1)
    np.testing.assert_allclose(found.excess, mean - at_center.mean(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.reference, at_center.mean(), rtol=1e-12)
    slope = np.mean((1 - at_center**2)[:, None] * x, axis=0)
    np.testing.assert_allclose(found.slope, slope, rtol=1e-10)
    assert program.lower(*arguments).as_text().count("stablehlo.tanh") == 1


@pytest.mark.parametrize("draws", [2, 6, 16, 26])
def test_points_beside_the_draws_share_their_program(draws):
    rng = np.random.default_rng(draws)
    x, center, v = rng.normal(size=(9, 3)), rng.normal(size=3), rng.normal(size=(draws, 3))
    objective = make_flat_objective(lambda w, batch: jnp.mean(jnp.tanh(batch @ w)))
    program = jax.jit(lambda *arguments: losses_at(objective, *arguments))
    arguments, points = (
        tuple(map(jnp.asarray, (center, v, x))),
        jnp.asarray(rng.normal(size=(4, 3))),
    )
    alone = program(*arguments)
    assert alone.beside is None
    wanted, unwanted = (
        program(*arguments, Beside(points, jnp.asarray(on))) for on in (True, False)
    )
    mean = np.mean(np.tanh((center + points) @ x.T), axis=1)
    np.testing.assert_allclose(wanted.beside, mean - np.tanh(x @ center).mean(), rtol=1e-9)
    np.testing.assert_array_equal(unwanted.beside, np.zeros(4))
    for found in (wanted, unwanted):
        for name in ("excess", "reference", "slope"):
            np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=1e-12)
    text = program.lower(*arguments, Beside(points, jnp.asarray(True))).as_text()
    assert text.count("stablehlo.tanh") == 1
    assert losses_beside(4, draws) == {2: 2 * 3, 6: 7, 16: 9, 26: 2 * 3}[draws]
