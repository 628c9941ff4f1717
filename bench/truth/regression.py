"""Logistic and softmax regression on noisy labels, at the maximum of the likelihood."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from bench.truth.problem import Problem

COUNT = 20_000
PAIRS, CHUNK = 4096, 32
REGULAR = "half the rank of the Hessian, which the logits set (Morse-Bott)"
SAMPLING = "importance sampling"


def class_logits(params, inputs, xp=jnp):
    """Return logits; a single one is that of class 1 against a class 0 of logit zero."""
    logits = inputs @ params
    return xp.concatenate([xp.zeros_like(logits), logits], -1) if params.shape[-1] == 1 else logits


def cross_entropy(params, batch):
    """Evaluate the mean loss."""
    inputs, labels = batch
    log_probs = jax.nn.log_softmax(class_logits(params, inputs))
    return -jnp.mean(jnp.take_along_axis(log_probs, labels[:, None], axis=1))


def float64_loss(params, inputs, labels):
    """Evaluate the mean loss of each of a stack of parameters, of moderate logits."""
    columns = params.shape[-1]
    classes = np.arange(columns) + (columns == 1)
    # the mean logit of the right class is linear in the parameters
    right = inputs.T @ (labels[:, None] == classes) / len(inputs)
    logits = inputs @ np.moveaxis(params, 0, 1).reshape(inputs.shape[1], -1)
    odds = np.exp(logits).reshape(len(inputs), len(params), columns).sum(axis=2)
    partition = np.log(odds + (columns == 1)).mean(axis=0)
    return partition - np.sum(params * right, axis=(1, 2))


def derivatives(params, inputs, labels):
    """Return the gradient of the mean loss and its Hessian, of the flat parameters."""
    columns = params.shape[1]
    logits = class_logits(params, inputs, np)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs = (probs / probs.sum(axis=1, keepdims=True))[:, -columns:]
    hits = (labels[:, None] == np.arange(logits.shape[1]))[:, -columns:]
    gradient = inputs.T @ (probs - hits) / len(inputs)
    hessian = np.zeros((*params.shape, *params.shape))
    for one in range(columns):
        for other in range(columns):
            weights = probs[:, one] * ((one == other) - probs[:, other])
            hessian[:, one, :, other] = inputs.T @ (weights[:, None] * inputs) / len(inputs)
    return gradient.ravel(), hessian.reshape(params.size, params.size)


def maximum_likelihood(inputs, labels, columns: int):
    """Descend by Newton's method; what the logits do not set stays at zero."""
    params = np.zeros((inputs.shape[1], columns))
    for _ in range(12):
        gradient, hessian = derivatives(params, inputs, labels)
        params = params - (np.linalg.pinv(hessian, rcond=1e-10) @ gradient).reshape(params.shape)
    return params


def importance_answer(
    params, inputs, labels, nbeta: float, gamma: float, pairs: int = PAIRS
) -> tuple[float, float]:
    """Reweight draws of the Laplace approximation, localizer included, in float64.

    Draws come in pairs v and -v, whose odd terms cancel, and the energy of the quadratic model,
    whose mean under the draws is known, is a control.

    Returns:
        The llc, and its standard error over pairs.
    """
    inputs = np.asarray(inputs, np.float64)
    center = np.asarray(params, np.float64)
    gradient, hessian = derivatives(center, inputs, labels)
    precision = nbeta * hessian + gamma * np.eye(center.size)
    root = np.linalg.inv(np.linalg.cholesky(precision)).T
    half = np.random.default_rng(0).normal(size=(pairs, center.size)) @ root.T
    draws = np.stack([half, -half], axis=1).reshape(-1, center.size)
    least = float64_loss(center[None], inputs, labels)
    energies = nbeta * np.concatenate(
        [
            float64_loss(center + part.reshape(-1, *center.shape), inputs, labels) - least
            for part in np.split(draws, len(draws) // CHUNK)
        ]
    )
    modelled = 0.5 * nbeta * np.sum((draws @ hessian) * draws, axis=1)
    mean_modelled = 0.5 * nbeta * np.trace(np.linalg.solve(precision, hessian))
    weights = np.exp(modelled - energies)
    weights /= weights.mean()
    value = np.mean(weights * energies)
    terms = (weights * (energies - value)).reshape(-1, 2).mean(axis=1)
    controls = (modelled - mean_modelled).reshape(-1, 2).mean(axis=1)
    slope = np.cov(terms, controls)[0, 1] / controls.var(ddof=1)
    value -= slope * controls.mean()
    return float(value), float(np.std(terms - slope * controls, ddof=1) / np.sqrt(pairs))


def regression(name: str, inputs: int, classes: int, gamma: float) -> Problem:
    """Return a regression on correlated inputs and a constant; a tenth of the labels is random."""
    rng = np.random.default_rng(50 + classes)
    mixing = rng.normal(size=(inputs, inputs)) / np.sqrt(inputs)
    features = np.concatenate([rng.normal(size=(COUNT, inputs)) @ mixing, np.ones((COUNT, 1))], 1)
    columns = 1 if classes == 2 else classes
    logits = class_logits(rng.normal(size=(inputs + 1, columns)), features, np)
    labels = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
    labels = np.where(rng.random(COUNT) < 0.1, rng.integers(classes, size=COUNT), labels)
    features = features.astype(np.float32)
    params = maximum_likelihood(features.astype(float), labels, columns).astype(np.float32)
    problem = Problem(
        name,
        cross_entropy,
        params,
        (features, labels.astype(np.int32)),
        gamma,
        COUNT,
        theory=(inputs + 1) * (classes - 1) / 2,
        theory_source=REGULAR,
        exact_method=SAMPLING,
    )
    exact = functools.partial(importance_answer, params, features, labels, problem.nbeta, gamma)
    return dataclasses.replace(problem, exact=exact)


REGRESSIONS = {
    "logistic_10_g1": lambda: regression("logistic_10_g1", 9, 2, 1.0),
    "softmax_30_g1": lambda: regression("softmax_30_g1", 9, 3, 1.0),
}
