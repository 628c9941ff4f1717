"""The look at a loss before anything is compiled for long.

What is refused, in which words, and what it costs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
import fastvi.api.estimate
from fastvi._errors import DataError
from fastvi.target.data import Problem, hold
from fastvi.target.look import look_at_target
from fastvi.target.objective import make_flat_objective
from fastvi.target.posterior import LocalPosterior

COUNT, DIM = 300, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(COUNT, DIM)).astype(np.float32)
MASK = (RNG.random((COUNT, 6)) < np.linspace(0.1, 1, COUNT)[:, None]).astype(np.float32)
TOKENS = RNG.normal(size=(COUNT, 6, DIM)).astype(np.float32)
DATA = tuple(jnp.asarray(leaf) for leaf in (X, MASK, TOKENS))
CENTER = jnp.zeros(DIM)


def mean_square(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w) ** 2)


def masked(w, batch):
    return jnp.sum(batch[1] * (1 + (batch[2] @ w)) ** 2) / jnp.sum(batch[1])


def normalised(w, batch):
    values = batch[0] @ (1 + w)
    return jnp.mean(jnp.tanh((values - values.mean()) / (values.std() + 1e-3)) ** 2)


def contrastive(w, batch):
    scores = (batch[0] + w) @ batch[0].T
    return -jnp.mean(jax.nn.log_softmax(scores)[jnp.arange(len(scores)), jnp.arange(len(scores))])


def dropped_by_place(w, batch):
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, (batch[0].shape[0],))
    return jnp.mean(kept * (1 + batch[0] @ w) ** 2)


def noisy(w, batch):
    noise = jax.pure_callback(
        lambda: np.float32(RNG.normal()), jax.ShapeDtypeStruct((), jnp.float32)
    )
    return mean_square(w, batch) + 0.02 * noise


@jax.custom_vjp
def wrong_slope(x):
    return 0.5 * x**2


wrong_slope.defvjp(lambda x: (wrong_slope(x), x), lambda x, g: (3 * x * g,))


def look(loss, center=CENTER, data=DATA, count=COUNT, nbeta=50.0, gamma=1.0, budget=np.inf):
    objective = loss if hasattr(loss, "value_and_grad") else make_flat_objective(loss)
    posterior = LocalPosterior(
        center, jnp.asarray(nbeta, center.dtype), jnp.asarray(gamma, center.dtype)
    )
    return look_at_target(
        objective, Problem(posterior, hold(data), 64), None, "loss_fn", budget_fge=budget
    )[1]


REFUSED = {
    "mean over a batch's own mask": (
        masked,
        "not a mean over the examples.*return .losses, weights.",
    ),
    "sum over the batch": (lambda w, b: 0.5 * jnp.sum((1 + b[0] @ w) ** 2), "It is their sum"),
    "sum over the data's size": (
        lambda w, b: jnp.sum((1 + b[0] @ w) ** 2) / COUNT,
        "It is their sum",
    ),
    "batch statistics": (normalised, "not a mean over the examples.*evaluation mode"),
    "in-batch negatives": (contrastive, "not a mean over the examples.*contrastive"),
    "root of the mean": (
        lambda w, b: jnp.sqrt(jnp.mean((1 + b[0] @ w) ** 2)),
        "not a mean over the examples",
    ),
    "largest of the batch": (
        lambda w, b: jnp.max((1 + b[0] @ w) ** 2),
        "not a mean over the examples",
    ),
    "dropout by place in the batch": (dropped_by_place, "not a mean over the examples.*dropout"),
    "noise from the host": (noisy, "not deterministic"),
    "weights by place in the batch": (
        lambda w, b: jnp.mean((1 + b[0] @ w) ** 2 * jnp.linspace(0, 2, len(b[0]))),
        "not a mean over the examples|order of the examples",
    ),
    "gradient three times the loss's": (
        lambda w, b: jnp.mean(wrong_slope(b[0] @ w)),
        "disagrees with the loss",
    ),
    "gradient of nothing": (
        lambda w, b: jax.lax.stop_gradient(mean_square(w, b)),
        "disagrees with the loss.*stop_gradient",
    ),
    "NaN at w*": (lambda w, b: mean_square(w, b) + 0 * jnp.log(w[0]), "is nan at w. itself"),
    "infinite at w*": (
        lambda w, b: mean_square(w, b) - jnp.log(jnp.sum(w**2)),
        "is inf at w. itself",
    ),
    "NaN gradient at w*": (lambda w, b: jnp.sqrt(jnp.sum(w**2)), "gradient.*not finite in 4 of 4"),
}


@pytest.mark.parametrize(("loss", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_estimate_could_be_right_for_is_refused(loss, message):
    with pytest.raises(DataError, match=message):
        look(loss)


def network(w, batch):
    hidden = jnp.maximum(batch[0] @ w[:12].reshape(4, 3), 0)
    return jnp.mean(jnp.logaddexp(0, hidden @ w[12:15])) + 1e-3 * jnp.sum(w**2)


def half_precision(w, batch):
    narrow = w.astype(jnp.bfloat16)
    scores = (batch[0].astype(jnp.bfloat16) @ narrow).astype(jnp.float32)
    return jnp.mean(jnp.logaddexp(0, scores))


def interpolating(w, batch):
    """Residuals of rounding at w*, as a model has that was trained to fit its data."""
    return 0.5 * jnp.mean((batch[0] @ (w * 1.1) - batch[0] @ jnp.full(DIM, 0.77)) ** 2)


ACCEPTED = {
    "nothing but rounding at w*": (interpolating, CENTER + 0.7),
    "least squares": (mean_square, CENTER),
    "relu network with weight decay": (network, jnp.asarray(RNG.normal(size=15), jnp.float32)),
    "no use of the data": (lambda w, b: 0.5 * jnp.sum(w**2), CENTER),
    "computed in bfloat16": (half_precision, CENTER + 0.5),
    "one loss for each token": (lambda w, b: (1 + b[2] @ w) ** 2, CENTER),
    "masked tokens with weights": (lambda w, b: ((1 + b[2] @ w) ** 2, b[1]), CENTER),
    "falls away": (lambda w, b: -mean_square(w, b), CENTER),
    "quartic": (lambda w, b: jnp.mean((b[0] @ w) ** 4), CENTER),
    "constant": (lambda w, b: 1.0 + 0 * jnp.sum(w), CENTER),
    "overflows away from w*": (lambda w, b: jnp.sum(jnp.exp((1e9 * w) ** 4)), CENTER),
    "tiny": (lambda w, b: 1e-20 * mean_square(w, b), CENTER),
}


@pytest.mark.parametrize(("loss", "center"), ACCEPTED.values(), ids=ACCEPTED)
def test_honest_losses_pass(loss, center):
    found = look(loss, center)
    assert 0 < found.sample_gradients <= 2 * COUNT + COUNT / 3  # a pass for the mean weight


@pytest.mark.parametrize("most", [1, 2, 5, 16])
def test_no_more_examples_than_asked_for_at_once(most):
    seen, full = [], []

    def loss(w, batch):
        return 0.5 * jnp.mean((batch[0] @ w - 1) ** 2)

    class Counted:
        def value_and_grad(self, w, batch):
            seen.append(batch[0].shape[0])
            return jax.value_and_grad(loss)(w, batch)

        def loss(self, w, batch):
            seen.append(batch[0].shape[0])
            return loss(w, batch)

        def grad(self, w, batch):
            return jax.grad(loss)(w, batch)

    objective = Counted()
    data = hold((jnp.ones((40, DATA[0].shape[1])),))
    problem = Problem(LocalPosterior(CENTER, jnp.float32(50), jnp.float32(1)), data, most)
    look_at_target(
        objective,
        problem,
        None,
        "loss_fn",
        budget_fge=np.inf,
        max_batch=most,
        loss_full_flat=lambda w: full.append(1) or loss(w, data.examples),
    )
    assert full
    assert 0 < max(seen) <= most


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40, 300])
@pytest.mark.parametrize("budget", [np.inf, 10.0])
def test_cost_is_bounded(count, budget):
    data = jax.tree_util.tree_map(lambda leaf: leaf[:count], DATA)
    found = look(lambda w, b: jnp.mean((1 + b[0] @ w) ** 2), data=data, count=count, budget=budget)
    assert found.sample_gradients <= max(min(2 * count, 0.05 * budget * count), 2)
    if count >= 40:
        assert found.sample_gradients > 10


def test_sum_of_few_examples_is_seen():
    data = jax.tree_util.tree_map(lambda leaf: leaf[:3], DATA)
    with pytest.raises(DataError, match="their sum"):
        look(lambda w, b: jnp.sum((1 + b[0] @ w) ** 2), data=data, count=3)


def test_rounding_is_measured_in_nats():
    """Near 1e6 a float32 moves by 1/16.

    Nbeta/2 sum_i H_ii ulp^2 / 12 nats; and a loss of 1e8 by 8.
    """
    curvatures = jnp.asarray([4.0, 2.0, 1.0, 0.5])
    far = look(lambda w, b: 0.5 * jnp.sum(curvatures * (w - 1e6) ** 2), CENTER + 1e6)
    assert far.weight_rounding == pytest.approx(50 / 2 * 7.5 / 16**2 / 12, rel=0.05)
    high = look(lambda w, b: 0.5 * jnp.sum(curvatures * w**2) + 1e8)
    assert high.loss_rounding == pytest.approx(50 * 8)
    near = look(lambda w, b: 0.5 * jnp.sum(curvatures * (w - 1) ** 2) + 1, CENTER + 1)
    assert near.weight_rounding < 1e-9
    assert near.loss_rounding == pytest.approx(50 * 2.0**-23)


@pytest.mark.usefixtures("x64")
def test_float64_resolves():
    found = look(lambda w, b: 0.5 * jnp.sum((w - 1e6) ** 2) + 1e8, jnp.full(DIM, 1e6, jnp.float64))
    assert found.weight_rounding < 1e-9
    assert found.loss_rounding < 1e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("at", [0, COUNT // 2, COUNT - 1])
def test_a_single_example_of_another_mask_is_seen(at):
    """Rows are chosen to be unlike: one short sequence among 300 is among them."""
    mask = np.ones((COUNT, 6))
    mask[at, 1:] = 0
    data = (DATA[0], jnp.asarray(mask), DATA[2])
    with pytest.raises(DataError, match="not a mean"):
        look(masked, data=data)


def test_refused_before_the_fit(monkeypatch):
    monkeypatch.setattr(fastvi.api.estimate, "run_fit", None)
    with pytest.raises(DataError, match="not a mean"):
        fastvi.estimate_llc(masked, CENTER, DATA, progress=False)


QUICK = {
    "progress": False,
    "steps": 100,
    "num_chains": 2,
    "method": "variational",
    "early_stop": False,
    "M": 1,
    "r": 0,
}


def at_a_distance(w, batch):
    return 0.5 * jnp.sum(np.float32([4.0, 2.0, 1.0, 0.5]) * (w - jnp.max(batch)) ** 2)


@pytest.mark.parametrize("shift", [1e6, 0.0])
def test_weights_too_coarse_for_the_posterior_are_a_finding(shift):
    shifts = np.full((COUNT, 1), shift, np.float32)
    result = fastvi.estimate_llc(at_a_distance, CENTER + shift, shifts, **QUICK)
    found = [finding for finding in result.health if finding.name == "coarse_numbers"]
    assert len(found) == (shift > 0)
    assert all("float64" in finding.next_step for finding in found)


def test_one_bad_example_is_named_as_that_of_w_star():
    """A row among many, that no look at a few sees.

    The loss of all data at w* is NaN, and that is what is said.
    """
    marks = np.random.default_rng(1).permutation(5000).astype(np.float32)
    data = (
        np.ones((5000, DIM), np.float32),
        marks,
    )  # in the middle, where no rank makes it stand out
    loss = lambda w, b: 0.5 * jnp.mean((b[0] @ w) ** 2 + jnp.where(b[1] == 2500, jnp.nan, 0))  # noqa: E731
    result = fastvi.estimate_llc(loss, CENTER, data, **QUICK, batch_size=4, throw=False)
    assert result.health[0].name == "non_finite"
    assert "at w* itself" in result.health[0].observed
