"""Estimates and fits against values known by formula, linear algebra or long HMC runs."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.target.objective import make_flat_objective

COUNT = 10_000  # examples of the losses that do not look at them
NBETA = COUNT / math.log(COUNT)


def no_data(count=COUNT):
    return jnp.zeros((count, 1))


def tell(name, result, *more):
    """Show what was measured, under `pytest -s`."""
    words = f"llc {result.llc:.4f} +- {result.llc_sem:.4f}, elbo {result.elbo:.3f}"
    work = f"{result.traces['elbo'].shape[1]} steps, {result.work.total_fge:.0f} FGE"
    findings = [finding.name for finding in result.health]
    say(f"{name}: {words}, {work}, {findings}", *more)


def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def rotation(seed, dim):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def quadratic(curvatures, basis):
    """Return 1/2 v^T H v, the rows of `basis` the eigenvectors of H."""
    curvatures, basis = jnp.asarray(curvatures, jnp.float32), jnp.asarray(basis, jnp.float32)
    return lambda w, batch: 0.5 * jnp.sum(curvatures * (basis @ w) ** 2)


def quadratic_llc(curvatures, nbeta, gamma):
    curvatures = np.asarray(curvatures, np.float64)
    return 0.5 * np.sum(nbeta * curvatures / (nbeta * curvatures + gamma))


def quadratic_log_z(curvatures, nbeta, gamma, dim, loss=0.0):
    """Log of the integral of exp(-nbeta L - gamma/2 |v|^2), the other directions flat."""
    precisions = gamma + nbeta * np.pad(
        np.asarray(curvatures, np.float64), (0, dim - len(curvatures))
    )
    return 0.5 * (dim * np.log(2 * np.pi) - np.sum(np.log(precisions))) - nbeta * loss


# Quadratics: the posterior is Gaussian, so both numbers are known.


@pytest.mark.parametrize("dim", [pytest.param(20, marks=pytest.mark.slow), 50])
def test_rotated_quadratic_of_condition_1e4(dim):
    curvatures = np.logspace(-4, 0, dim)
    result = fastvi.estimate_llc(
        quadratic(curvatures, rotation(dim, dim)),
        jnp.ones(dim) * 0.0,
        no_data(),
        localization=1e-3,
        progress=False,
        method="variational",
    )
    llc, log_z = (
        quadratic_llc(curvatures, NBETA, 1e-3),
        quadratic_log_z(curvatures, NBETA, 1e-3, dim),
    )
    tell(f"quadratic {dim}", result, "truth", llc, log_z)
    assert result.llc == pytest.approx(llc, rel=0.01)
    assert result.elbo == pytest.approx(log_z, abs=0.5)
    assert not [finding for finding in result.health if finding.severity != "note"]


@pytest.fixture(scope="module")
def regression():
    """Least squares with noise: data, the minimum, and the posterior's exact numbers."""
    count, dim, gamma = 1000, 20, 1.0
    rng = np.random.default_rng(1)
    X = rng.normal(size=(count, dim)) @ (rotation(2, dim) * np.logspace(-1, 0.5, dim))
    Y = X @ rng.normal(size=dim) + 0.3 * rng.normal(size=count)
    w = np.linalg.solve(X.T @ X, X.T @ Y)
    loss = 0.5 * np.mean((X @ w - Y) ** 2)
    curvatures = np.linalg.eigvalsh(X.T @ X / count)
    nbeta = count / math.log(count)
    result = fastvi.estimate_llc(
        lambda w, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2),
        jnp.asarray(w, jnp.float32),
        (X.astype(np.float32), Y.astype(np.float32)),
        localization=gamma,
        batch_size=256,
        progress=False,
        method="variational",
    )
    return (
        result,
        quadratic_llc(curvatures, nbeta, gamma),
        quadratic_log_z(curvatures, nbeta, gamma, dim, loss),
        loss,
    )


def test_least_squares_on_minibatches(regression):
    result, llc, log_z, loss = regression
    tell("least squares", result, "truth", llc, log_z, "per chain", result.llc_per_chain)
    assert result.llc == pytest.approx(llc, rel=0.01)
    assert result.elbo == pytest.approx(log_z, abs=0.5)
    assert result.init_loss == pytest.approx(loss, rel=1e-4)
    assert result.work.total_fge < 1300
    assert result.converged


def test_few_steep_directions_among_flat_ones():
    dim, steep, gamma = 2000, 20, 1.0
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(dim, steep)))[0].T
    curvatures = np.logspace(-1, 1, steep)
    result = fastvi.estimate_llc(
        quadratic(curvatures, basis),
        jnp.zeros(dim),
        no_data(),
        localization=gamma,
        progress=False,
        method="variational",
    )
    llc, log_z = (
        quadratic_llc(curvatures, NBETA, gamma),
        quadratic_log_z(curvatures, NBETA, gamma, dim),
    )
    tell("20 of 2000", result, "truth", llc, log_z, "rank", result.curvature.rank)
    assert result.llc == pytest.approx(llc, rel=0.02)
    assert result.curvature.rank == steep


# Singular losses.


def deep_linear_net(turned=True):
    """5-5-5, every layer of rank 2, in its own rotated coordinates."""
    bases = [rotation(10 + layer, 5) if turned else np.eye(5) for layer in range(3)]
    keep = np.diag([1.0, 1.0, 0.0, 0.0, 0.0])
    params = {
        f"W{i + 1}": jnp.asarray(bases[i + 1] @ keep @ bases[i].T, jnp.float32) for i in range(2)
    }
    target = jnp.asarray(bases[2] @ keep @ bases[0].T, jnp.float32)

    # inputs of unit covariance: the mean over them is known
    def loss_fn(params, batch):
        return 0.5 * jnp.sum((params["W2"] @ params["W1"] - target) ** 2)

    return loss_fn, params


@pytest.fixture(scope="module")
def deep_linear():
    loss_fn, params = deep_linear_net()
    estimate = functools.partial(
        fastvi.estimate_llc,
        loss_fn,
        params,
        no_data(),
        localization=100.0,
        progress=False,
        num_chains=2,
        method="variational",
    )
    return estimate(), estimate(curvature_rank=0, means="center")


def test_deep_linear_net(deep_linear):
    default, plain = deep_linear
    for name, result in (("deep linear", default), ("k=0, centred", plain)):
        tell(name, result)
    assert default.llc == pytest.approx(8.2, rel=0.25)  # long HMC, bench/truth
    assert default.elbo > plain.elbo + 10


@pytest.mark.parametrize(
    ("degrees", "gamma"),
    [
        pytest.param((2, 2), 1.0, id="crossing"),
        pytest.param((2, 2, 2), 1e-3, id="triple", marks=pytest.mark.slow),
        pytest.param((4,), 1.0, id="quartic"),
    ],
)
def test_singular_llc_follows_the_virial(degrees, gamma):
    """L homogeneous of degree D in v: at the best fit D nbeta E[L] + gamma E|v|^2 = d."""
    dim, degree = len(degrees), sum(degrees)
    result = fastvi.estimate_llc(
        lambda w, batch: jnp.prod(w ** jnp.asarray(degrees)),
        jnp.zeros(dim),
        no_data(1000),
        localization=gamma,
        progress=False,
        method="variational",
        samples_per_step=200,  # of heavy-tailed gradients: the fits then differ by 1 %
    )
    radius2 = result.traces["radius2"][:, -100:].mean()
    stationary = float(dim - gamma * radius2) / degree
    tell(f"monomial {degrees}", result, "by the virial", stationary)
    assert result.llc_sem < 0.025 * result.llc  # the spread of the fits
    assert result.llc == pytest.approx(stationary, abs=max(0.025 * stationary, 4 * result.llc_sem))
    assert min(result.evaluation.variance_reduction) > 100


# Slow: the seeds' family, honest errors, and the order of families on a real network.


@pytest.mark.slow
def test_seeds_family_on_an_axis_aligned_quadratic():
    """No core, no mean, no schedule: what the seeds fit, given time."""
    dim, gamma = 12, 1.0
    curvatures = np.logspace(-3, 0, dim)
    result = fastvi.fit(
        rng_key=0,
        objective=make_flat_objective(quadratic(curvatures, np.eye(dim))),
        wstar_flat=jnp.zeros(dim),
        data=no_data(1000),
        n_data=1000,
        beta=1 / math.log(1000),
        gamma=gamma,
        vi_cfg={
            "M": 8,
            "r": 2,
            "curvature_rank": 0,
            "means": "center",
            "lr_schedule": None,
            "steps": 5000,
        },
    )
    llc = quadratic_llc(curvatures, 1000 / math.log(1000), gamma)
    say("lambda_hat", result["lambda_hat"], "+-", result["extras"]["llc_sem"], "truth", llc)
    assert float(result["lambda_hat"]) == pytest.approx(llc, rel=0.02)


def small_tanh_net():
    """2-3-1 tanh network trained to its minimum on 200 examples; returns flat loss, w*, data."""
    rng = np.random.default_rng(4)
    X = rng.normal(size=(200, 2)).astype(np.float32)
    Y = (np.tanh(X @ [1.5, -1.0]) + 0.3 * rng.normal(size=200)).astype(np.float32)

    def loss(w, batch):
        hidden = jnp.tanh(batch[0] @ w[:6].reshape(2, 3) + w[6:9])
        return 0.5 * jnp.mean((hidden @ w[9:12] - batch[1]) ** 2)

    value_and_grad = jax.value_and_grad(loss)
    w = jnp.asarray(0.5 * rng.normal(size=12), jnp.float32)

    def step(carry, _):
        w, velocity = carry
        velocity = 0.9 * velocity - 0.1 * value_and_grad(w, (X, Y))[1]
        return (w + velocity, velocity), None

    (w, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=20_000))((w, jnp.zeros(12)))
    return loss, w, (X, Y)


@pytest.mark.slow
def test_llc_sem_is_the_error_of_the_evaluation():
    """Many keys on one problem: within one llc_sem two times in three, where fits agree."""
    loss, w, data = small_tanh_net()

    def one(key):
        out = fastvi.fit(
            rng_key=key,
            objective=make_flat_objective(loss),
            wstar_flat=w,
            data=data,
            n_data=200,
            beta=1 / math.log(200),
            gamma=1.0,
            vi_cfg={"steps": 1000, "batch_size": 200, "M": 2, "lr": 3e-3},
        )
        return out["lambda_hat"], out["extras"]["llc_sem"]

    llc, sem = map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200)))
    within = np.mean(np.abs(llc - llc.mean()) < sem)
    ratio = llc.std(ddof=1) / sem.mean()
    say(
        f"llc {llc.mean():.4f}, std {llc.std(ddof=1):.4f}, sem {sem.mean():.4f}, {ratio=:.3f}, "
        f"{within=:.3f}"
    )
    assert 0.5 < within < 0.85
    assert 0.7 < ratio < 1.5


@pytest.mark.slow
def test_digits_richer_families_come_closer():
    """A mean, then a core, bring the estimate down towards HMC's 44 and the bound up."""
    pytest.importorskip("sklearn")
    from fastvi.demos.digits import cross_entropy, init_network, load_digits, train

    data = load_digits()
    params = train(init_network(jax.random.key(0), 16), data, 4000, 1e-2)
    results = [
        fastvi.estimate_llc(
            cross_entropy,
            params,
            data,
            num_chains=2,
            progress=False,
            method="variational",
            **changes,
        )
        for changes in (
            {"means": "center", "curvature_rank": 0},
            {"curvature_rank": 0},
            {},
        )
    ]
    for result in results:
        tell("digits", result)
    centred, shared, core = results
    assert centred.llc > shared.llc > core.llc > 44
    assert centred.elbo < shared.elbo < core.elbo
