"""What SGLD would report: against closed forms, and against runs of SGLD."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import fastvi
from fastvi.geometry.spectrum import lanczos
from fastvi.sampling.sgld import QuadraticSGLD

COUNT, DIM, GAMMA, NBETA = 200, 6, 4.0, 30.0
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(COUNT, DIM)) * np.linspace(0.2, 1.5, DIM)
OUTPUTS = INPUTS @ np.ones(DIM) + 1.5 * RNG.normal(size=COUNT)
CENTER = np.linalg.lstsq(INPUTS, OUTPUTS, rcond=None)[0]
HESSIAN = INPUTS.T @ INPUTS / COUNT
PRECISION = NBETA * HESSIAN + GAMMA * np.eye(DIM)
LLC = 0.5 * NBETA * np.trace(HESSIAN @ np.linalg.inv(PRECISION))
DATA = INPUTS.astype(np.float32), OUTPUTS.astype(np.float32)
CHAINS = 256


def loss_fn(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2


def estimated(**options):
    return fastvi.estimate_llc(
        loss_fn,
        jnp.asarray(CENTER, jnp.float32),
        DATA,
        nbeta=NBETA,
        localization=GAMMA,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def result():
    return estimated()


def second_moments(lr, batch_size, steps):
    """Follow E[v v'] of SGLD from w*, whose noise is that of examples at where it is.

    Returns:
        llc at each step: that before the step, as SGLD records it.
    """
    errors = INPUTS @ CENTER - OUTPUTS
    keep, moment, llc = np.eye(DIM) - lr / 2 * PRECISION, np.zeros((DIM, DIM)), []
    for _ in range(steps):
        llc.append(0.5 * NBETA * np.trace(HESSIAN @ moment))
        squares = errors**2 + np.sum(INPUTS @ moment * INPUTS, axis=1)
        noise = (INPUTS.T * squares) @ INPUTS / COUNT - HESSIAN @ moment @ HESSIAN
        heat = 0 if batch_size is None else (lr * NBETA / 2) ** 2 * noise / batch_size
        moment = keep @ moment @ keep + lr * np.eye(DIM) + heat
    return np.array(llc)


@functools.partial(quick_jit, static_argnames=("batch_size", "steps"))
def sgld(lr, key, batch_size, steps):
    """Run the chains, and return llc at the minibatch before each step."""
    center, data = jnp.asarray(CENTER, jnp.float32), tuple(map(jnp.asarray, DATA))

    def mean_loss(w, batch):
        return jnp.mean(loss_fn(w, batch))

    def step(w, key):
        key_batch, key_noise = jax.random.split(key)
        rows = jax.random.randint(key_batch, (batch_size,), 0, COUNT)
        batch = tuple(leaf[rows] for leaf in data)
        loss, slope = jax.value_and_grad(mean_loss)(w, batch)
        drift = NBETA * slope + GAMMA * (w - center)
        noise = jnp.sqrt(lr) * jax.random.normal(key_noise, w.shape)
        return w - lr / 2 * drift + noise, NBETA * (loss - mean_loss(center, batch))

    def chain(key):
        return jax.lax.scan(step, center, jax.random.split(key, steps))[1]

    return jax.vmap(chain)(jax.random.split(key, CHAINS))


@pytest.mark.parametrize(
    ("lr", "batch_size", "burn_in", "num_steps"),
    [(2e-3, 64, 0, 300), (2e-3, 8, 0, 300), (8e-3, 8, 60, 240), (1.6e-2, 64, 0, 100)],
)
def test_a_forecast_is_what_sgld_reports(result, lr, batch_size, burn_in, num_steps):
    """By a closed form for the second moments of a regression, and by chains."""
    found = fastvi.forecast_sgld(
        result, lr=lr, batch_size=batch_size, num_steps=num_steps, burn_in=burn_in
    )
    exact = second_moments(lr, batch_size, burn_in + num_steps)[burn_in:].mean()
    chains = np.asarray(
        sgld(lr, jax.random.key(1), batch_size=batch_size, steps=burn_in + num_steps)
    )
    means = chains[:, burn_in:].mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(CHAINS)
    assert abs(means.mean() - exact) < 4 * error
    assert abs(found.predicted - means.mean()) < 4 * np.hypot(error, found.predicted_sem)
    assert abs(found.predicted - exact) < 4 * found.predicted_sem
    assert found.predicted_sem < 0.06 * exact
    assert found.is_anchored
    assert not found.is_rough


def test_parts_are_those_of_the_closed_form(result):
    lr, batch_size = 1e-2, 16
    found = fastvi.forecast_sgld(result, lr=lr, batch_size=batch_size)
    values, basis = np.linalg.eigh(HESSIAN)
    precision = NBETA * values + GAMMA
    shares = NBETA * values / precision
    slack = 1 - lr * precision / 4
    # the loss is a quadratic, whose Hessian has no noise from point to point
    np.testing.assert_allclose(found.curvatures[:: len(found.curvatures) // DIM], values, rtol=1e-3)
    assert found.widening == pytest.approx(0.5 * np.sum(shares * (1 / slack - 1)), rel=1e-3)
    assert found.quadratic_llc == pytest.approx(LLC, rel=1e-3)
    assert found.counts.sum() == pytest.approx(DIM, rel=1e-4)
    assert found.largest_lr == pytest.approx(4 / precision.max(), rel=1e-4)
    assert found.relaxation_steps == pytest.approx(2 / (lr * GAMMA))
    errors = INPUTS @ CENTER - OUTPUTS
    squares = errors**2 + np.sum(INPUTS @ np.linalg.inv(PRECISION) * INPUTS, axis=1)
    noise = (INPUTS.T * squares) @ INPUTS / COUNT - HESSIAN @ np.linalg.inv(PRECISION) @ HESSIAN
    variances = np.diag(basis.T @ noise @ basis) / batch_size
    heat = 0.5 * np.sum(shares / slack * lr * NBETA**2 * variances / 4)
    assert heat > 0.2 * LLC
    # of 64 vectors of noise, whose lengths vary as those of heavy tails do
    assert found.heat == pytest.approx(heat, rel=0.25)
    full = fastvi.forecast_sgld(result, lr=lr, batch_size=None)
    assert full.heat == 0
    assert full.widening == found.widening


def test_advice_keeps_to_its_tolerance(result):
    found = fastvi.forecast_sgld(result, lr=1e-2, batch_size=16, tolerance=0.05)
    there = fastvi.forecast_sgld(result, lr=found.advised_lr, batch_size=16, tolerance=0.05)
    assert there.widening + there.heat == pytest.approx(0.05 * result.llc, rel=1e-6)
    later, exact = int(there.advised_burn_in), second_moments(there.lr, None, 4000)
    assert 1 - exact[later] / exact[-1] == pytest.approx(0.05, rel=0.15)
    text = found.summary()
    assert f"{found.advised_lr:.3g} or less for a bias within 5 %" in text
    assert "heat" in text


def test_steps_that_diverge_are_told(result):
    limit = fastvi.forecast_sgld(result, lr=1e-3, batch_size=64).largest_lr
    found = fastvi.forecast_sgld(result, lr=1.01 * limit, batch_size=64, num_steps=10)
    assert not found.is_stable
    assert found.predicted == found.widening == np.inf
    assert "diverges       lr is above" in found.summary()
    # the second moments agree
    growing = second_moments(1.01 * limit, None, 3000)
    assert growing[-1] > 1e3 * growing[100]
    bounded = second_moments(0.99 * limit, None, 3000)
    assert bounded[-1] == pytest.approx(bounded[-1000], rel=1e-6)


def test_other_settings_are_those_of_the_quadratic(result):
    found = fastvi.forecast_sgld(
        result, lr=1e-3, batch_size=None, nbeta=2 * NBETA, localization=GAMMA / 2
    )
    precision = 2 * NBETA * HESSIAN + GAMMA / 2 * np.eye(DIM)
    exact = NBETA * np.trace(HESSIAN @ np.linalg.inv(precision))
    assert not found.is_anchored
    assert found.posterior_llc == pytest.approx(exact, rel=1e-3)
    assert "by the quadratic model" in found.summary()


def test_draws_of_q_stand_for_walkers(result):
    of_q = dataclasses.replace(result, ensemble=None)
    found = fastvi.forecast_sgld(of_q, lr=1e-2, batch_size=None)
    assert found.quadratic_llc == pytest.approx(LLC, rel=1e-3)
    # what the quadratic does not say is told
    far = dataclasses.replace(of_q, llc=2 * result.llc)
    rough = fastvi.forecast_sgld(far, lr=1e-2, batch_size=None)
    assert rough.is_rough
    assert "rough" in rough.summary()
    assert "rough" not in found.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a number > 0"),
        ({"batch_size": 0}, "batch_size must be an integer"),
        ({"localization": 0.0}, "localization must be a number > 0"),
        ({"num_steps": 1.5}, "num_steps must be an integer"),
        ({"num_steps": 5, "burn_in": -1}, "burn_in must be an integer"),
        ({"burn_in": 5}, "no effect on the stationary mean"),
        ({"tolerance": -1.0}, "tolerance must be a number > 0"),
    ],
)
def test_impossible_settings_are_refused(result, options, message):
    with pytest.raises(fastvi.ConfigError, match=message):
        fastvi.forecast_sgld(result, **{"lr": 1e-3, "batch_size": 8, **options})


def test_a_result_without_points_is_refused(result, tmp_path):
    result.save(tmp_path / "one")
    with pytest.raises(fastvi.DataError, match="holds neither walkers nor a fit"):
        fastvi.forecast_sgld(fastvi.LLCEstimate.load(tmp_path / "one"), lr=1e-3, batch_size=None)


def test_lanczos_integrates_over_the_spectrum():
    """Of dense eigenvectors: with as many steps as dimensions to rounding, with fewer nearly."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    values = np.concatenate([-0.01 * np.ones(5), np.logspace(-3, 1, 35)])
    matrix = (basis * values) @ basis.T
    starts = rng.normal(size=(3, 40))

    def apply(block):
        return block @ jnp.asarray(matrix, jnp.float32)

    for steps, tolerance in ((40, 1e-3), (16, 1e-2)):
        found = lanczos(apply, jnp.asarray(starts, jnp.float32), steps)
        nodes, weights = (np.asarray(leaf, float) for leaf in found)
        exact = np.sum((starts @ basis) ** 2 * values / (values + 0.1), axis=1)
        np.testing.assert_allclose(
            np.sum(weights * nodes / (nodes + 0.1), 1), exact, rtol=tolerance
        )
        np.testing.assert_allclose(weights.sum(axis=1), np.sum(starts**2, axis=1), rtol=1e-4)


def test_an_exhausted_space_has_no_other_nodes():
    matrix = jnp.diag(jnp.asarray([3.0, 3.0, 1.0, 0.0]))
    found = lanczos(lambda block: block @ matrix, jnp.ones((1, 4)), 4)
    assert float(jnp.sum(found.weights * found.values**3)) == pytest.approx(55.0, rel=1e-5)
    assert float(jnp.sum(found.weights)) == pytest.approx(4.0, rel=1e-5)


def test_remaining_and_missing_follow_the_variances():
    """Of independent directions, by their recursion."""
    values, variances = np.array([0.1, 1.0, 5.0]), np.array([2.0, 1.0, 0.5])
    lr, nbeta, gamma, batch = 0.02, 10.0, 3.0, 4
    model = QuadraticSGLD(
        *(row[None] for row in (values, np.ones(3), values, variances)),
        nbeta=nbeta,
        localization=gamma,
        lr=lr,
        batch_size=batch,
    )
    keep, state, llc = (1 - lr / 2 * (gamma + nbeta * values)) ** 2, np.zeros(3), []
    for _ in range(3000):
        llc.append(0.5 * nbeta * np.sum(values * state))
        state = keep * state + lr + (lr * nbeta / 2) ** 2 * variances / batch
    llc = np.array(llc)
    assert (model.llc + model.widening + model.heat)[0] == pytest.approx(llc[-1], rel=1e-9)
    assert model.remaining(7) == pytest.approx(1 - llc[7] / llc[-1], rel=1e-9)
    assert model.missing(5, 50) == pytest.approx(1 - llc[5:55].mean() / llc[-1], rel=1e-9)
    steps = model.burn_in_for(0.01)
    assert model.remaining(steps) <= 0.01 < model.remaining(steps - 1)
