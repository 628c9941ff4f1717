"""`virial_llc`.

The learning coefficient from the chains of any sampler, with virial control variates.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._html import result_html
from fastvi._typing import Float, Given, PyTree
from fastvi.api.arguments import nonnegative_scalar, positive_scalar
from fastvi.sampling.averages import analyse, burn_in, furthest_off, split_rhat, stated_error
from fastvi.sampling.settings import SamplerSettings
from fastvi.sampling.virial import block_virials, parameter_blocks

LEAST_DRAWS = 4  # of each chain
OFF_SIGMAS = 4.0  # standard errors at which the mean of a column is not taken for zero
MIXED = 1.1  # R-hat up to which chains agree
TINY = np.finfo(float).tiny  # keeps quotients of zero by zero from NaN
SWAPPED = 0.3  # correlation from one chain to the next, beyond which draws lie where chains should


@dataclasses.dataclass(frozen=True)
class VirialLLC:
    """What a sampler's chains say of the learning coefficient.

    Attributes:
        llc: nbeta (mean L - init_loss) with control variates.
        llc_sem: Its standard error, from autocorrelation and the spread of the chains.
        plain: The same mean without control variates.
        plain_sem: Its standard error.
        variance_reduction: Variance of L over that of L less its control variates.
        rhat: Split R-hat, the largest of those of the losses, of these less their control variates,
            and of |w - w*|^2.
        virial_z: Mean of a function that has mean zero under the posterior, in its standard errors,
            of the one that is furthest off: the virial of each block of parameters, slopes along
            the chains' mean and mean slope. Beyond some 4 the chains are not at this posterior
            (steps too long, burn-in too short, or another nbeta, localization or center).
        burn_in: Draws discarded from the start of each chain.
        per_chain: `llc` of each chain, shape (chains,).
    """

    llc: float
    llc_sem: float
    plain: float
    plain_sem: float
    variance_reduction: float
    rhat: float
    virial_z: float
    burn_in: int
    per_chain: Float[np.ndarray, " chains"]

    @property
    def is_consistent(self) -> bool:
        """Whether the chains agree, and obey the virial identities of the posterior."""
        return abs(self.virial_z) < OFF_SIGMAS and self.rhat < MIXED

    def _repr_html_(self) -> str:
        """Return it for a notebook."""
        return result_html(self.summary())

    def summary(self) -> str:
        """Return the estimate in words."""
        lines = [
            f"llc      {self.llc:.4g} ± {self.llc_sem:.2g}   (plain mean {self.plain:.4g} ± "
            f"{self.plain_sem:.2g})",
            f"virial   variance reduced {self.variance_reduction:.3g} times; "
            f"off by {self.virial_z:.2g} standard errors",
            f"chains   R-hat {self.rhat:.3f}, {self.burn_in} draws of each discarded",
        ]
        if not abs(self.virial_z) < OFF_SIGMAS:
            lines.append(
                "The chains do not sample this posterior: shorten steps, discard more, or check "
                "center, nbeta and localization."
            )
        if not self.rhat < MIXED:
            lines.append(
                "The chains do not agree: run them longer, or discard those that are stuck."
            )
        return "\n".join(lines)


def virial_llc(
    samples: PyTree,
    gradients: PyTree,
    losses: Any,
    *,
    nbeta: Given[float],
    localization: Given[float],
    center: PyTree,
    init_loss: Given[float],
    discard: Given[int | None] = None,
) -> VirialLLC:
    """Estimate the learning coefficient from a sampler's chains, with control variates.

    For each block of parameters `length - v . grad(-log p)` with v = w - w* has mean zero under the
    local posterior `exp(-nbeta L_n(w) - localization/2 |w - w*|^2)`; so has the slope along the
    mean of the chains. What they explain of L_n is taken away. Works for HMC and NUTS, and for SGLD
    if `gradients` are those of full data or of a minibatch drawn afresh at each sample; the losses
    may be of minibatches too.

    Args:
        samples: Parameters of each draw: any pytree whose leaves have leading axes (chains, draws),
            or (draws,).
        gradients: Gradient of the mean loss at each draw, in the same structure.
        losses: Mean loss of each draw, in nats, shape (chains, draws) or (draws,).
        nbeta: n times the inverse temperature.
        localization: Strength gamma of the Gaussian that ties w to w*.
        center: w*, in the structure of one draw.
        init_loss: L_n(w*), in nats.
        discard: Draws to discard from the start of each chain; None finds them (MSER, at least a
            fifth).

    Returns:
        The estimate; `print(virial_llc(...).summary())`.

    Raises:
        ConfigError: If nbeta, localization or `discard` is out of range.
        DataError: If shapes do not agree, values are not finite, or there are too few draws.

    Cost:
        O(draws d) on the host; no gradient.

    References:
        Mira, Solgi & Imparato, Zero Variance MCMC (2013).
    """
    nbeta, localization = (
        positive_scalar("nbeta", nbeta),
        nonnegative_scalar("localization", localization),
    )
    energies = _energies(losses)
    points, slopes, at = _flat(samples, gradients, center, np.shape(losses))
    displacement = points - at
    force = nbeta * slopes + localization * displacement
    sizes = tuple(int(np.size(leaf)) for leaf in jax.tree_util.tree_leaves(center) if np.size(leaf))
    each = block_virials(
        displacement * force, parameter_blocks(sizes, SamplerSettings().max_columns)
    )
    radius2 = np.sum(displacement**2, axis=-1)
    llc = nbeta * (energies - _number("init_loss", init_loss))
    burn = _discarded(discard, llc, radius2)
    columns = np.stack([*each, _slope(force, displacement, burn)], axis=-1)
    found = analyse(llc, columns, radius2, discard=burn)
    # the direction in which a slope that should be zero would show best
    steepest = _slope(force, force / np.maximum(force[:, burn:].var(axis=(0, 1)), TINY), burn)
    kept = llc[:, burn:]
    return VirialLLC(
        llc=found.llc,
        llc_sem=found.llc_sem,
        plain=float(kept.mean()),
        plain_sem=stated_error(kept),
        variance_reduction=found.variance_reduction,
        rhat=max(found.rhat, found.rhat_radius, split_rhat(kept)),
        virial_z=max(found.virial_z, furthest_off(steepest[:, burn:, None]), key=abs),
        burn_in=burn,
        per_chain=found.per_walker,
    )


def _energies(losses: Any) -> Float[np.ndarray, "chains draws"]:
    values = _real(losses, "losses")
    if values.ndim not in (1, 2):
        raise DataError(f"losses must have shape (chains, draws) or (draws,); got {values.shape}.")
    _check_finite(values, "losses")
    values = np.atleast_2d(values)
    chains, draws = values.shape
    if chains > draws and _neighbours(values) > max(SWAPPED, OFF_SIGMAS / np.sqrt(chains)):
        raise DataError(
            f"losses must have shape (chains, draws); got {values.shape}, and each row is like "
            "the one before, as the draws of a chain are. Swap the axes of losses, samples and "
            "gradients."
        )
    return values


def _neighbours(values: np.ndarray) -> float:
    """Return the correlation of each row with the next."""
    centred = values - values.mean(axis=0)
    variance = np.mean(centred**2)
    return float(np.mean(centred[1:] * centred[:-1]) / variance) if variance > 0 else 0.0


def _flat(
    samples: PyTree, gradients: PyTree, center: PyTree, lead: tuple[int, ...]
) -> list[np.ndarray]:
    """Return samples, gradients and center as (chains, draws, dim), leaves side by side.

    Of the center (1, 1, dim).
    """
    trees = {"samples": samples, "gradients": gradients, "center": center}
    structures = {name: jax.tree_util.tree_structure(tree) for name, tree in trees.items()}
    if len(set(structures.values())) > 1:
        listed = ", ".join(f"{name}: {structure}" for name, structure in structures.items())
        raise DataError(
            f"samples, gradients and center must have the same structure; got {listed}."
        )
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(center)[0]
    ]
    shapes = [np.shape(leaf) for leaf in jax.tree_util.tree_leaves(center)]
    if not sum(map(np.prod, shapes)):
        raise DataError("center holds no parameters; pass w*, in the structure of one draw.")
    flat = []
    for name, tree in trees.items():
        leading, rows = ((), (1, 1)) if name == "center" else (lead, (1, *lead)[-2:])
        parts = []
        for path, shape, leaf in zip(paths, shapes, jax.tree_util.tree_leaves(tree), strict=True):
            array = _real(leaf, name + path)
            if array.shape != (*leading, *shape):
                raise DataError(
                    f"{name}{path} must have shape {(*leading, *shape)}, the axes of the losses "
                    "before those of "
                    f"center{path}, so that all have the same structure; got {array.shape}."
                )
            _check_finite(array, name + path)
            parts.append(array.reshape(*rows, -1))
        flat.append(np.concatenate(parts, axis=-1))
    return flat


def _real(leaf: Any, name: str) -> np.ndarray:
    """Return a leaf in double precision: of draws, an array of floats of at least 4 bytes."""
    array = np.asarray(leaf)
    # A center of integers loses nothing; draws of integers have been rounded.
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    if not floating and not (
        name.startswith("center") and jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise DataError(f"{name} must be floating-point numbers; got dtype {array.dtype}.")
    if name == "losses" and array.dtype.itemsize < 4:
        raise DataError(
            f"losses have dtype {array.dtype}, too coarse for the differences of losses that make "
            "up llc. Compute them in float32."
        )
    return array.astype(float)


def _check_finite(array: np.ndarray, name: str) -> None:
    if not np.all(np.isfinite(array)):
        raise DataError(
            f"{name} are not finite in {np.sum(~np.isfinite(array))} places. Drop diverged chains."
        )


def _number(name: str, value: Any) -> float:
    if (
        np.shape(value) != ()
        or not np.issubdtype(np.asarray(value).dtype, np.number)
        or not np.isfinite(value)
    ):
        raise ConfigError(f"{name} must be a finite number; got {value!r}.")
    return float(value)


def _discarded(discard: Given[int | None], llc: np.ndarray, radius2: np.ndarray) -> int:
    draws = llc.shape[1]
    if discard is None:
        burn = max(draws // 5, burn_in(llc), burn_in(radius2)) if draws else 0
    elif isinstance(discard, bool) or not isinstance(discard, (int, np.integer)) or discard < 0:
        raise ConfigError(f"discard must be an integer >= 0, or None to find it; got {discard!r}.")
    else:
        burn = int(discard)
    if draws - burn < LEAST_DRAWS:
        raise DataError(
            f"{draws} draws less {burn} discarded leave fewer than {LEAST_DRAWS} in each chain."
        )
    return burn


def _slope(force: np.ndarray, along: np.ndarray, burn: int) -> Float[np.ndarray, "chains draws"]:
    """Return the slope of -log p along the mean of the other half of the chains.

    A single chain is halved in time. With the draw's own half in the mean, the slope along it would
    not have mean zero.
    """
    chains, draws, _ = force.shape
    # A row over time, or a column over chains.
    half = (
        np.arange(draws) < (draws + burn) // 2
        if chains == 1
        else np.arange(chains)[:, None] % 2 == 0
    )
    first = np.broadcast_to(half, (chains, draws))
    # Draws that are discarded say nothing of the mean.
    late = np.arange(draws) >= burn
    of_rest, of_first = (along[part & late].mean(axis=0) for part in (~first, first))
    return np.where(first, force @ of_rest, force @ of_first)
