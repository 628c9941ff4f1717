"""`virial_llc`: the learning coefficient from the chains of any sampler, with virial control variates."""

import dataclasses
from typing import Any

import jax
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Float, PyTree
from fastvi.estimators.analysis import analyse, burn_in, standard_error
from fastvi.estimators.walk import block_virials, parameter_blocks

LEAST_DRAWS = 4  # of each chain
OFF_SIGMAS = 4.0


@dataclasses.dataclass(frozen=True)
class VirialLLC:
    """What a sampler's chains say of the learning coefficient.

    Attributes:
        llc: nbeta (mean L - init_loss) with control variates.
        llc_sem: Its standard error, from autocorrelation and the spread of the chains.
        plain: The same mean without control variates.
        plain_sem: Its standard error.
        variance_reduction: Variance of L over that of L less its control variates.
        rhat: Split R-hat of the adjusted values.
        virial_z: Mean of the virial, which is zero under the posterior, in standard errors: beyond some 4 the chains
            are not at this posterior (steps too long, burn-in too short, or another nbeta or localization).
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
        """Whether the chains obey the virial identity of the posterior."""
        return abs(self.virial_z) < OFF_SIGMAS

    def summary(self) -> str:
        """Return the estimate in words."""
        lines = [
            f"llc      {self.llc:.4g} ± {self.llc_sem:.2g}   (plain mean {self.plain:.4g} ± {self.plain_sem:.2g})",
            f"virial   variance reduced {self.variance_reduction:.3g} times; "
            f"off by {self.virial_z:.2g} standard errors",
            f"chains   R-hat {self.rhat:.3f}, {self.burn_in} draws of each discarded",
        ]
        if not self.is_consistent:
            lines.append("The chains do not sample this posterior: shorten steps, or discard more.")
        return "\n".join(lines)


def virial_llc(
    samples: PyTree,
    gradients: PyTree,
    losses: Any,
    *,
    nbeta: float,
    localization: float,
    center: PyTree,
    init_loss: float,
    discard: int | None = None,
) -> VirialLLC:
    """Estimate the learning coefficient from a sampler's chains, with control variates of mean zero.

    For each block of parameters `length - v . grad(-log p)` with v = w - w* has mean zero under the local posterior
    `exp(-nbeta L_n(w) - localization/2 |w - w*|^2)`; so has the slope along the mean of the chains. What they explain
    of L_n is taken away. Works for HMC and NUTS, and for SGLD if `gradients` are those of full data or of a minibatch
    drawn afresh at each sample; the losses may be of minibatches too.

    Args:
        samples: Parameters of each draw: any pytree whose leaves have leading axes (chains, draws), or (draws,).
        gradients: Gradient of the mean loss at each draw, in the same structure.
        losses: Mean loss of each draw, in nats, shape (chains, draws) or (draws,).
        nbeta: n times the inverse temperature.
        localization: Strength gamma of the Gaussian that ties w to w*.
        center: w*, in the structure of one draw.
        init_loss: L_n(w*), in nats.
        discard: Draws to discard from the start of each chain; None finds them (MSER, at least a fifth).

    Returns:
        The estimate; `print(virial_llc(...).summary())`.

    Raises:
        DataError: If shapes do not agree, values are not finite, or there are too few draws.

    Cost:
        O(draws d) on the host; no gradient.

    References:
        Mira, Solgi & Imparato, Zero Variance MCMC (2013).
    """
    energies = np.asarray(losses, float)
    if energies.ndim not in (1, 2):
        raise DataError(f"losses must have shape (chains, draws) or (draws,); got {energies.shape}.")
    energies = np.atleast_2d(energies)
    points, slopes, at = (_stack(tree, energies.shape, name) for tree, name in _named(samples, gradients, center))
    if not points.shape[-1] == slopes.shape[-1] == at.shape[-1]:
        raise DataError(
            f"samples, gradients and center have {points.shape[-1]}, {slopes.shape[-1]} and {at.shape[-1]} parameters; "
            "they must have the same structure."
        )
    for name, values in (("samples", points), ("gradients", slopes), ("losses", energies)):
        if not np.all(np.isfinite(values)):
            raise DataError(f"{name} are not finite in {np.sum(~np.isfinite(values))} places. Drop diverged chains.")
    displacement = points - at
    force = nbeta * slopes + localization * displacement
    sizes = tuple(int(np.size(leaf)) for leaf in jax.tree_util.tree_leaves(center))
    own = block_virials(displacement * force, parameter_blocks(sizes))
    radius2 = np.sum(displacement**2, axis=-1)
    llc = nbeta * (energies - init_loss)
    burn = max(llc.shape[1] // 5, burn_in(llc), burn_in(radius2)) if discard is None else discard
    if llc.shape[1] - burn < LEAST_DRAWS:
        raise DataError(f"{llc.shape[1]} draws less {burn} discarded leave fewer than {LEAST_DRAWS} in each chain.")
    mean = displacement[:, burn:].mean(axis=(0, 1))
    columns = np.stack([*own, force @ mean], axis=-1)
    found = analyse(llc, columns, radius2, discard=burn)
    kept = llc[:, burn:]
    return VirialLLC(
        llc=found.llc,
        llc_sem=found.llc_sem,
        plain=float(kept.mean()),
        plain_sem=standard_error(kept),
        variance_reduction=found.variance_reduction,
        rhat=found.rhat,
        virial_z=found.virial_z,
        burn_in=burn,
        per_chain=found.per_walker,
    )


def _named(samples: PyTree, gradients: PyTree, center: PyTree) -> list[tuple[PyTree, str]]:
    return [(samples, "samples"), (gradients, "gradients"), (center, "center")]


def _stack(tree: PyTree, shape: tuple[int, int], name: str) -> Float[np.ndarray, "chains draws dim"]:
    """Return the leaves side by side, flat; those of the center with axes of length one."""
    lead = (1, 1) if name == "center" else shape
    leaves = [np.asarray(leaf, float) for leaf in jax.tree_util.tree_leaves(tree)]
    if not leaves or any(leaf.size % np.prod(lead) or leaf.size == 0 for leaf in leaves):
        found = [leaf.shape for leaf in leaves]
        raise DataError(f"{name} must have leading axes (chains, draws) = {shape} as the losses have; got {found}.")
    return np.concatenate([leaf.reshape(*lead, -1) for leaf in leaves], axis=-1)
