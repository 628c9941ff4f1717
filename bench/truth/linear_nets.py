"""Deep linear networks: at the most degenerate minimum, and at regular ones.

Inputs have unit covariance, so the mean loss over them is 1/2 |W_L ... W_1 - T|^2 (Frobenius).
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from bench.truth.aoyagi import deep_linear_learning_coefficient
from bench.truth.gibbs import GIBBS, linear_network_answer, product
from bench.truth.problem import Problem, no_data, rotation
from bench.truth.quadrature import two_unit_answer

COUNT = 10_000
FEW_DIMENSIONS = 300  # where a sweep of 64 chains takes milliseconds
AOYAGI = "Aoyagi 2024, every layer of the rank of the product"
REGULAR = "half the rank of the Hessian, which is that of the map to the product (Morse-Bott)"


def layers_of(params):
    """Return W_1, ..., W_L."""
    return [params[name] for name in sorted(params)]


def layer_product(params):
    """Multiply W_L ... W_1."""
    return product(layers_of(params))


def degenerate_layers(widths, rank):
    """Return layers with `rank` singular values 1, the others 0, each in its own rotated bases."""
    draws = [
        np.random.default_rng(10 + side).normal(size=(width, rank))
        for side, width in enumerate(widths)
    ]
    bases = [np.linalg.qr(draw)[0] for draw in draws]
    return {
        f"W{i + 1}": (bases[i + 1] @ bases[i].T).astype(np.float32) for i in range(len(widths) - 1)
    }


def regular_layers(widths, rank):
    """Return a first layer of rank `rank` under orthogonal ones.

    The layers above can reach any change of the product.

    Raises:
        ValueError: If the widths after the first are not all equal.
    """
    if len(set(widths[1:])) > 1:
        raise ValueError(f"the layers after the first must be square; got widths {widths}.")
    first = rotation(10, widths[1])[:, :rank] @ rotation(11, widths[0])[:, :rank].T
    above = {f"W{i}": rotation(10 + i, widths[1]).astype(np.float32) for i in range(2, len(widths))}
    return {"W1": first.astype(np.float32), **above}


def deep_linear(name, widths, rank, gamma, size="fast", *, is_regular=False) -> Problem:
    """Return a deep linear network whose loss does not look at the data."""
    params = (regular_layers if is_regular else degenerate_layers)(widths, rank)
    target = layer_product(params)

    def loss_fn(params, batch):
        return 0.5 * jnp.sum((layer_product(params) - target) ** 2)

    theory = (
        widths[0] * widths[-1] / 2 if is_regular else deep_linear_learning_coefficient(widths, rank)
    )
    problem = Problem(
        name,
        loss_fn,
        params,
        no_data(COUNT),
        gamma,
        COUNT,
        theory=theory,
        theory_source=REGULAR if is_regular else AOYAGI,
        size=size,
        exact_method=GIBBS,
    )
    return dataclasses.replace(problem, exact=gibbs_answer(problem))


def gibbs_answer(problem: Problem):
    """Return what samples the posterior of a linear network, in seconds to minutes."""
    chains, sweeps = (64, 4000) if problem.dim <= FEW_DIMENSIONS else (16, 1000)
    return functools.partial(
        linear_network_answer,
        layers_of(problem.params),
        problem.nbeta,
        float(problem.gamma),
        sweeps=sweeps,
        chains=chains,
    )


def reduced_rank_regression(name, widths, rank, gamma, count=1000, noise=0.3) -> Problem:
    """Return two linear layers on data.

    White inputs and noise that no linear map of the inputs can fit.

    The full-data loss then is the population's plus a constant, and minibatches are noisy.
    """
    params = degenerate_layers(widths, rank)
    rng = np.random.default_rng(20)
    inputs = np.linalg.qr(rng.normal(size=(count, widths[0])))[0] * np.sqrt(count)
    errors = noise * rng.normal(size=(count, widths[-1]))
    errors -= inputs @ (inputs.T @ errors) / count
    outputs = inputs @ layer_product(params).T + errors

    def loss_fn(params, batch):
        return 0.5 * jnp.mean(jnp.sum((batch[0] @ layer_product(params).T - batch[1]) ** 2, axis=1))

    problem = Problem(
        name,
        loss_fn,
        params,
        (inputs.astype(np.float32), outputs.astype(np.float32)),
        gamma,
        count,
        theory=deep_linear_learning_coefficient(widths, rank),
        theory_source=AOYAGI,
        exact_method=GIBBS,
    )
    return dataclasses.replace(problem, exact=gibbs_answer(problem))


def two_unit_linear(name, inputs, outputs, gamma, size="fast") -> Problem:
    """Return two linear layers with two units between them, at zero, which is also the target.

    Known by quadrature.
    """
    problem = deep_linear(name, (inputs, 2, outputs), 0, gamma, size)
    exact = functools.partial(two_unit_answer, inputs, outputs, problem.nbeta, gamma)

    def loss_fn(params, batch):  # |W_2 W_1|^2 without the product
        return 0.5 * jnp.sum((params["W2"].T @ params["W2"]) * (params["W1"] @ params["W1"].T))

    return dataclasses.replace(problem, loss_fn=loss_fn, exact=exact, exact_method="quadrature")


TWO_UNITS = {
    "two_unit_linear_3_4": (3, 4, 1.0),
    "two_unit_linear_50_50_g10": (50, 50, 10.0),
    "two_unit_linear_250_250_g10": (250, 250, 10.0, "medium"),
    "two_unit_linear_2500_2500_g10": (2500, 2500, 10.0, "medium"),
}

# name: widths, rank, gamma, size
DEGENERATE = {
    "deep_linear_2x5_g100": ((5, 5, 5), 2, 100.0),
    "deep_linear_2x5_g10": ((5, 5, 5), 2, 10.0),
    "deep_linear_2x5_g1": ((5, 5, 5), 2, 1.0),
    "deep_linear_3x5_g100": ((5, 5, 5, 5), 2, 100.0),
    "deep_linear_3x5_g10": ((5, 5, 5, 5), 2, 10.0),
    "deep_linear_4x5_g100": ((5, 5, 5, 5, 5), 2, 100.0),
    "deep_linear_4x5_g10": ((5, 5, 5, 5, 5), 2, 10.0),
    "deep_linear_6_4_7_5_g10": ((6, 4, 7, 5), 1, 10.0),
    "deep_linear_10_rank0_g10": ((10, 10, 10), 0, 10.0),
    "deep_linear_2x22_g100": ((22, 22, 22), 6, 100.0, "medium"),
    "deep_linear_2x22_g10": ((22, 22, 22), 6, 10.0, "medium"),
    "deep_linear_3x18_g100": ((18,) * 4, 6, 100.0, "medium"),
    "deep_linear_3x18_g10": ((18,) * 4, 6, 10.0, "medium"),
    "deep_linear_4x16_g10": ((16,) * 5, 5, 10.0, "medium"),
    "deep_linear_3x58_g100": ((58,) * 4, 20, 100.0, "medium"),
    "deep_linear_3x58_g10": ((58,) * 4, 20, 10.0, "medium"),
    "deep_linear_4x50_g10": ((50,) * 5, 15, 10.0, "medium"),
    "deep_linear_3x183_g100": ((183,) * 4, 60, 100.0, "large"),
    "deep_linear_3x183_g10": ((183,) * 4, 60, 10.0, "large"),
}
SMOOTH = {
    "smooth_linear_2x5_g10": ((5, 5, 5), 2, 10.0),
    "smooth_linear_3x18_g10": ((18,) * 4, 6, 10.0, "medium"),
}

# At their most degenerate point and localization 1, beside theory: widths, rank.
SCALING = {
    f"theory_{len(widths) - 1}x{widths[0]}": (widths, rank)
    for widths, rank in (
        ((22,) * 3, 5),
        ((18,) * 4, 4),
        ((16,) * 5, 3),
        ((40,) * 3, 8),
        ((58,) * 4, 8),
        ((50,) * 5, 6),
        ((100,) * 4, 12),
        ((183,) * 4, 18),
    )
}

LINEAR_NETS = (
    {name: functools.partial(deep_linear, name, *settings) for name, settings in DEGENERATE.items()}
    | {
        name: functools.partial(deep_linear, name, *settings, is_regular=True)
        for name, settings in SMOOTH.items()
    }
    | {
        name: functools.partial(deep_linear, name, *settings, 1.0, "large")
        for name, settings in SCALING.items()
    }
    | {
        name: functools.partial(two_unit_linear, name, *settings)
        for name, settings in TWO_UNITS.items()
    }
    | {
        "reduced_rank_6_3_5": lambda: reduced_rank_regression(
            "reduced_rank_6_3_5", (6, 3, 5), 1, 1.0
        ),
        # its gradient noise turns with the walker: what is left of its heat shows here
        "reduced_rank_10_10_10_g10": lambda: reduced_rank_regression(
            "reduced_rank_10_10_10_g10", (10, 10, 10), 3, 10.0, count=10_000, noise=0.0
        ),
        "reduced_rank_5_5_5_g100": lambda: reduced_rank_regression(
            "reduced_rank_5_5_5_g100", (5, 5, 5), 2, 100.0
        ),
    }
)
