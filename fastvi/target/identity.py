"""What a loss computes, as a few numbers.

Whether a kept fit or run is of the same model, whatever it is called.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Batch, Float, PyTree
from fastvi.target.objective import FlatObjective

POINTS = 3  # near w*: one could miss a change in some of the weights
# Of the root mean square of w*, or of 1 where w* is 0. At half a change shows half as much.
DISPLACEMENT = 0.1
# Relative. Other devices and versions round otherwise, by some 1e-6 of a mean loss in float32.
TOLERANCE = 1e-5
LOSS = ("loss at w*", "loss near w*", "slopes near w*", "gradient norms near w*")
AT, NEAR, SLOPES, STEEPNESS = LOSS


def observe_loss(
    objective: FlatObjective, center: Float[Array, " dim"], batch: Batch
) -> dict[str, Any]:
    """Evaluate a loss at w* and at displaced points, and its slope along each displacement.

    At w* alone two losses may agree that agree nowhere else: a model that interpolates has loss and
    gradient zero.

    Cost:
        A loss, and `POINTS` losses and gradients, on one batch.
    """
    # One seed for all runs, so that what was observed in another run can be compared.
    random = np.random.default_rng(0)
    scale = float(jnp.sqrt(jnp.mean(center.astype(jnp.float32) ** 2))) or 1.0
    seen: dict[str, Any] = {
        AT: float(objective.loss(center, batch)),
        NEAR: [],
        SLOPES: [],
        STEEPNESS: [],
    }
    for _ in range(POINTS):
        direction = random.standard_normal(center.size, dtype=np.float32)
        point = center + jnp.asarray(DISPLACEMENT * scale * direction, center.dtype)
        gradient = np.asarray(objective.grad(point, batch), float)
        seen[NEAR].append(float(objective.loss(point, batch)))
        seen[SLOPES].append(float(gradient @ direction) / math.sqrt(center.size))
        seen[STEEPNESS].append(float(np.linalg.norm(gradient)))
    return seen


def differing(now: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """Name the entries that differ by more than the rounding of a loss and its gradients."""
    return [name for name in now if not _is_same(name, now, kept)]


def list_changes(names: Sequence[str], kept: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say of each entry what it was, and what it is now."""
    return "; ".join(f"{name} was {kept.get(name)!r}, now {now[name]!r}" for name in names)


def _is_same(name: str, now: Mapping[str, Any], kept: Mapping[str, Any]) -> bool:
    if name not in LOSS or not all(
        _are_numbers(found.get(entry)) for found in (now, kept) for entry in LOSS
    ):
        return now[name] == kept.get(name)
    old, new = np.asarray(kept[name], float), np.asarray(now[name], float)
    # the loss at w* may be zero but for rounding, and a slope small beside its gradient: neither is
    # its own scale
    scale = {AT: np.max(np.abs(now[NEAR])), SLOPES: np.asarray(now[STEEPNESS], float)}.get(
        name, np.abs(new)
    )
    if old.shape != new.shape:
        return False
    # A loss that overflows in both runs agrees: infinities differ by NaN, which is not near.
    with np.errstate(invalid="ignore"):
        near = np.abs(old - new) <= TOLERANCE * (scale + np.abs(new))
    return bool(np.all(near | (old == new) | (np.isnan(old) & np.isnan(new))))


def _are_numbers(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in values)


def digest_tree(tree: PyTree) -> str:
    """Condense the arrays of a tree."""
    digest = hashlib.sha256()
    for leaf in jax.tree_util.tree_leaves(tree):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()[:16]
