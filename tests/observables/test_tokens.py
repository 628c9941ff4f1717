"""Losses of tokens: their covariances and influences on a Gaussian posterior, and masks."""

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi.observables.example_losses import losses_by_token
from fastvi.target.data import Problem, hold

COUNT, TOKENS, DIM, GAMMA, NBETA = 24, 3, 4, 2.0, 20.0
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(COUNT, TOKENS, DIM)).astype(np.float32)
OUTPUTS = (INPUTS @ np.ones(DIM) + 0.5 * RNG.normal(size=(COUNT, TOKENS))).astype(np.float32)
# weights 0, 1 and 2, so that some tokens are masked and others count twice
WEIGHTS = RNG.integers(0, 3, size=(COUNT, TOKENS)).astype(np.float32)
DATA = INPUTS, OUTPUTS, WEIGHTS
OTHER = INPUTS[:5] + 0.5, OUTPUTS[:5], WEIGHTS[:5]


def plain(w, batch):
    return 0.5 * (batch[0] @ w - batch[1]) ** 2


def weighted(w, batch):
    return plain(w, batch), batch[2]


class Gaussian:
    """The posterior in closed form: tokens of all examples in one axis."""

    def __init__(self):
        self.inputs, self.outputs = INPUTS.reshape(-1, DIM).astype(float), OUTPUTS.ravel()
        self.shares = WEIGHTS.ravel() / WEIGHTS.mean()
        root = np.sqrt(self.shares)
        self.center = np.linalg.lstsq(root[:, None] * self.inputs, root * self.outputs)[0]
        self.covariance = np.linalg.inv(self.precision(np.ones(COUNT * TOKENS)))

    def precision(self, weights):
        shares = self.shares * weights
        return NBETA * (self.inputs.T * shares) @ self.inputs / len(shares) + GAMMA * np.eye(DIM)

    def mean(self, weights):
        """Return the mean of w where tokens have other weights in n L_n."""
        shares = self.shares * weights / len(weights)
        slope = NBETA * self.inputs.T @ (shares * self.outputs) + GAMMA * self.center
        return np.linalg.solve(self.precision(weights), slope)

    def of_losses(self):
        """Return Cov(loss_i, loss_j) = g_i' S g_j + tr(H_i S H_j S) / 2 of all tokens."""
        slopes = self.inputs * (self.inputs @ self.center - self.outputs)[:, None]
        slopes = slopes * self.shares[:, None]
        inner = self.inputs @ self.covariance @ self.inputs.T
        products = np.outer(self.shares, self.shares) * inner**2
        return slopes @ self.covariance @ slopes.T + 0.5 * products


@pytest.fixture(scope="module")
def gaussian():
    return Gaussian()


@pytest.fixture(scope="module")
def result(gaussian):
    return fastvi.estimate_llc(
        weighted,
        jnp.asarray(gaussian.center, jnp.float32),
        DATA,
        localization=GAMMA,
        nbeta=NBETA,
        sampler={"start": "localizer"},
        error=0.2,
        progress=False,
    )


@pytest.fixture(scope="module")
def draws(result):
    return fastvi.sample_posterior(
        result,
        200,
        losses={"examples": DATA},
        token_losses={"tokens": DATA, "other": OTHER},
        observables={"w": lambda w, _: w},
        thin=8,
        progress=False,
    )


def test_covariances_of_tokens_are_those_of_the_gaussian(draws, gaussian):
    exact, found = gaussian.of_losses(), draws.covariance("tokens")
    assert found.value.shape == (COUNT * TOKENS, COUNT * TOKENS)
    varies = np.outer(gaussian.shares, gaussian.shares) > 0
    scores = np.abs(found.value - exact)[varies] / found.sem[varies]
    # entries are functions of few directions, so that a share of them is off together
    assert np.mean(scores < 1) > 0.4
    assert np.mean(scores < 2) > 0.8
    assert np.max(scores) < 6  # of 5,000 entries
    scale = np.sqrt(np.diag(exact))
    with np.errstate(invalid="ignore"):
        correlation = exact / np.outer(scale, scale)
    found = draws.correlation("tokens")
    np.testing.assert_allclose(np.diag(found.value)[scale > 0], 1)
    scores = np.abs(found.value - correlation)[varies] / np.maximum(found.sem[varies], 1e-9)
    assert np.mean(scores < 2) > 0.8
    # what does not vary has no correlation
    assert np.all(np.isnan(found.value[~varies]))


def test_losses_of_tokens_average_to_those_of_examples(draws, gaussian):
    tokens, examples = draws.losses["tokens"], draws.losses["examples"]
    assert tokens.shape == (draws.num_walkers, 200, COUNT, TOKENS)
    np.testing.assert_allclose(tokens.mean(axis=-1), examples, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        draws.init_losses["tokens"].mean(), draws.init_losses["examples"].mean(), rtol=1e-6
    )
    assert draws.init_losses["tokens"].mean() == pytest.approx(draws.init_loss, rel=1e-5)
    residual = (INPUTS @ gaussian.center - OUTPUTS).ravel()
    np.testing.assert_allclose(
        draws.init_losses["tokens"].ravel(),
        gaussian.shares * 0.5 * residual**2,
        rtol=1e-4,
        atol=1e-6,
    )
    # that of a token with weight 0 is 0 at every draw
    masked = gaussian.shares == 0
    assert not tokens.reshape(*tokens.shape[:2], -1)[..., masked].any()
    np.testing.assert_allclose(
        draws.llc_on("tokens").value, draws.llc_on("examples").value, rtol=1e-5
    )


def test_influence_of_a_token_is_the_derivative_by_its_weight(draws, gaussian):
    """Of the mean parameters, by central differences of the closed form."""
    found = draws.influence("tokens", "w")
    for token in (0, 7, 40):
        change = np.zeros(COUNT * TOKENS)
        change[token] = 1e-4
        exact = (gaussian.mean(1 + change) - gaussian.mean(1 - change)) / 2e-4
        assert np.all(np.abs(found.value[token] - exact) <= 4.5 * found.sem[token])
    # tokens of an example add up to it
    for name in ("w", "examples"):
        whole = draws.influence("examples", name).value
        parts = draws.influence("tokens", name).value.reshape(COUNT, TOKENS, -1).sum(axis=1)
        np.testing.assert_allclose(parts, whole, rtol=1e-3, atol=1e-6)


def test_susceptibility_counts_every_token(draws, gaussian):
    inputs, outputs, weights = (part.reshape(-1, *part.shape[2:]) for part in OTHER)
    slope = (
        inputs.T @ (weights / weights.mean() * (inputs @ gaussian.center - outputs)) / len(outputs)
    )
    found = draws.susceptibility("w", "other")
    assert np.all(np.abs(found.value + NBETA * gaussian.covariance @ slope) < 4.5 * found.sem)


def problem_of(loss_fn):
    objective, center = fastvi.ravel_loss(loss_fn, jnp.ones(DIM))
    posterior = fastvi.LocalPosterior(center, jnp.float32(NBETA), jnp.float32(GAMMA))
    return objective, Problem(posterior, hold(DATA, max_batch=10), 8)


def test_losses_of_tokens_without_weights_are_what_the_function_returns():
    """In slices of ten examples, of which the last is four."""
    v = jnp.asarray(RNG.normal(size=(2, DIM)), jnp.float32)
    found = losses_by_token(*problem_of(plain), v)
    exact = [plain(np.ones(DIM) + np.asarray(one), DATA) for one in v]
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


def test_a_loss_without_tokens_is_refused(result):
    for reduce in (lambda losses: losses.mean(axis=1), jnp.mean):
        with pytest.raises(fastvi.DataError, match="one number for each token"):
            losses_by_token(
                *problem_of(lambda w, batch, reduce=reduce: reduce(plain(w, batch))),
                jnp.zeros((1, DIM)),
            )
    with pytest.raises(fastvi.ConfigError, match="names two things"):
        fastvi.sample_posterior(
            result, 8, losses={"a": DATA}, token_losses={"a": DATA}, progress=False
        )
