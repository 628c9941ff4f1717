"""What draws are of: the names of their values, and all that must be equal for a run to go on."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Keys
from fastvi.observables.zarr_arrays import Shapes
from fastvi.sampling.ensemble import Target
from fastvi.target.data import Problem
from fastvi.target.identity import DISPLACEMENT, differing, digest_tree, observe_loss
from fastvi.target.losses import take_examples
from fastvi.target.objective import FlatObjective

# What each draw has beside losses and observables, with its shape.
TRACES = {"energies": (2,), "slopes": (2,), "radius2": ()}
# begin the names of values
LOSSES, INIT_LOSSES, OBSERVABLES = "loss_", "init_loss_", "observable_"
# Relative difference up to which observables are the same: other devices round otherwise. Half
# refuses a GPU's, double lets a changed observable pass that differs by 2e-4.
SAME = 1e-4


def identify_draws(
    target: Target,
    keys: Keys,
    shapes: Shapes,
    sets: Mapping[str, Problem],
    observables: Mapping[str, Callable[[Any], Any]],
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Name all that draws depend on: how they are made, of what, and what is evaluated.

    Args:
        target: What is sampled.
        keys: Keys of the walkers.
        shapes: Shape of each value of a draw.
        sets: Data of which losses are evaluated.
        observables: `(displacement) -> values` by name. Two that agree near w* count as one.
        asked: Options, by name.
    """
    posterior, examples = target.problem.posterior, target.problem.data.examples
    first = take_examples(examples, slice(target.problem.batch_size))
    return {
        **asked,
        "walkers": keys.shape[0],
        "key": digest_tree(jax.random.key_data(keys)),
        "params": digest_tree(posterior.center),
        "data": digest_tree(examples),
        "n_data": target.problem.num_data,
        "nbeta": float(posterior.nbeta),
        "localization": float(posterior.gamma),
        **observe_loss(_compiled(target.objective), posterior.center, first),
        "evaluated": {name: list(shape) for name, shape in shapes.items()},
        **{f"data of {name}": digest_tree(one.data.examples) for name, one in sets.items()},
        **{
            OBSERVABLES + name: _observe(function, posterior.center, keys.shape[0])
            for name, function in observables.items()
        },
    }


def _compiled(objective: FlatObjective) -> Any:
    """Return the objective compiled: operation by operation its gradient takes 30 MB more."""
    return types.SimpleNamespace(loss=jax.jit(objective.loss), grad=jax.jit(objective.grad))


def _observe(
    function: Callable[[Any], Any], center: Float[Array, " dim"], walkers: int
) -> list[float]:
    """Return mean and root mean square of an observable near w*, where few agree by chance.

    It is evaluated at as many points as there are walkers, for which it is compiled anyway.
    """
    random = np.random.default_rng(0)
    scale = float(jnp.sqrt(jnp.mean(center.astype(jnp.float32) ** 2))) or 1.0
    v = DISPLACEMENT * scale * random.standard_normal((walkers, center.size), dtype=np.float32)
    values = np.asarray(function(jnp.asarray(v, center.dtype)), float)
    return [float(np.mean(values)), float(np.sqrt(np.mean(values**2)))]


def differing_entries(now: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """Name the entries of an identity that differ by more than rounding."""
    return [name for name in differing(now, kept) if not _are_near(name, now, kept)]


def _are_near(name: str, now: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
    """Say whether two entries are numbers of observables that differ by rounding."""
    if not name.startswith(OBSERVABLES):
        return False
    new, old = np.asarray(now[name], float), np.asarray(kept.get(name, ()), float)
    return new.shape == old.shape and bool(
        np.all(np.abs(new - old) <= SAME * np.max(np.abs(new), initial=0.0))
    )
