"""The learning coefficient along training: each fit begins at the q of the checkpoint before."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from fastvi._errors import ConfigError, DataError
from fastvi._html import result_html
from fastvi._modes import in_own_modes
from fastvi._typing import Batch, Given, PyTree
from fastvi.api.arguments import check_count
from fastvi.api.estimate import assemble, run_estimate
from fastvi.api.series import kept_members
from fastvi.api.split import split_llc
from fastvi.config import VIConfig
from fastvi.fitting.protocols import Progress
from fastvi.observables.covariance import Estimate
from fastvi.observables.split import Split, points_of
from fastvi.results.differences import LLCDifference, consecutive
from fastvi.results.estimate import LLCEstimate
from fastvi.results.report.differences import plot_differences
from fastvi.results.report.svg import svg_where_possible
from fastvi.results.saved import LIVE
from fastvi.results.terminal import aligned
from fastvi.target.containers import open_data
from fastvi.target.inputs import check_data, is_stream, refuse_a_trace
from fastvi.target.keys import as_key
from fastvi.target.ravel import TreeStructure, ravel_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class LLCCurve:
    """Estimates at the checkpoints of one training run, in their order.

    Attributes:
        estimates: One for each checkpoint.
        splits: Drift and spread of each llc, as `split_llc` has them; None where no walkers found
            it.
    """

    estimates: tuple[LLCEstimate, ...]
    splits: tuple[Split | None, ...] = ()

    @property
    def llc(self) -> np.ndarray:
        """The coefficients, shape (checkpoints,)."""
        return np.array([estimate.llc for estimate in self.estimates])

    @property
    def llc_sem(self) -> np.ndarray:
        """Their standard errors."""
        return np.array([estimate.llc_sem for estimate in self.estimates])

    @property
    def init_loss(self) -> np.ndarray:
        """The training loss at each checkpoint, in nats."""
        return np.array([estimate.init_loss for estimate in self.estimates])

    @property
    def total_fge(self) -> np.ndarray:
        """The work at each checkpoint, in full-gradient equivalents, but for that of `splits`.

        That is six at most, and none where no walkers found an llc.
        """
        return np.array([estimate.work.total_fge for estimate in self.estimates])

    @property
    def drift(self) -> Estimate:
        """What each llc has from a w* that is no minimum, with errors; NaN where it is not known.

        Negative where the loss falls away from w*.
        """
        return self._part("drift")

    @property
    def spread(self) -> Estimate:
        """What each llc has from the width of the posterior, with errors; NaN where not known."""
        return self._part("spread")

    def _part(self, name: str) -> Estimate:
        unknown = Estimate(np.asarray(np.nan), np.asarray(np.nan))
        parts = [unknown if one is None else getattr(one, name) for one in self.splits]
        parts += [unknown] * (len(self.estimates) - len(parts))
        return Estimate(
            *(np.array([getattr(one, part) for one in parts]) for part in unknown._fields)
        )

    @functools.cached_property
    def differences(self) -> tuple[LLCDifference, ...]:
        """The llc of each checkpoint less that of the one before, with errors.

        Walkers step on the same noise at every checkpoint. Where two posteriors are alike, the
        difference is known much better than either llc.
        """
        return consecutive(self.estimates)

    def summary(self) -> str:
        """Return a table: loss, llc, work and findings of each checkpoint."""
        head = ("checkpoint", "loss", "llc", "FGE", "findings")
        rows = [
            (
                str(number),
                f"{one.init_loss:.4g}",
                one.llc_text,
                f"{one.work.total_fge:.0f}",
                ", ".join(finding.name for finding in one.health) or "none",
            )
            for number, one in enumerate(self.estimates)
        ]
        return aligned([head, *rows])

    def _repr_html_(self) -> str:
        """Return the curve for a notebook."""
        return result_html(self.summary(), figure=svg_where_possible(self.plot, "llc"))

    def plot(self, steps: Sequence[float] | None = None) -> "Figure":
        """Draw llc with errors, and below the differences from checkpoint to checkpoint.

        Args:
            steps: Where along training each checkpoint is; their numbers when left out.

        Raises:
            ConfigError: If there is not one step for each checkpoint.
            MissingExtraError: If matplotlib is not installed.
        """
        if steps is not None and len(steps) != len(self.estimates):
            raise ConfigError(
                f"steps must hold one number for each of the {len(self.estimates)} checkpoints; "
                f"got {len(steps)}."
            )
        return plot_differences(
            self.llc,
            self.llc_sem,
            self.differences,
            where=None if steps is None else np.asarray(steps, float),
            label="checkpoint" if steps is None else "training step",
            beside={"spread": self.spread} if any(self.splits) else {},
        )


@in_own_modes
def llc_curve(
    loss_fn: Given[Callable[[PyTree, Batch], Any]],
    checkpoints: Given[Iterable[PyTree]],
    data: Given[Batch],
    *,
    key: Any = 0,
    nbeta: Given[float | None] = None,
    localization: Given[float | None] = None,
    config: Any = None,
    num_chains: Given[int | None] = None,
    progress: Given[bool | Callable[[Progress], None]] = True,
    throw: Given[bool] = True,
    warm_start: Given[bool] = True,
    warm_steps: Given[int | None] = None,
    resume_from: Given[str | os.PathLike[str] | None] = None,
    **overrides: Any,
) -> LLCCurve:
    """Estimate the local learning coefficient at every checkpoint of a training run.

    The first fit begins at the curvature there, every other at the q of the checkpoint before,
    moved to the new w* and narrowed where the loss says so. Where walkers correct the estimate,
    they too go on from where those of the checkpoint before have come to. A checkpoint in the
    middle of training is no minimum: the estimate is then of the posterior near it, and may be
    negative. The curve has its two parts, `drift` and `spread`: see `split_llc`.

    Args:
        loss_fn: `(params, batch) -> mean loss per example`, in nats.
        checkpoints: Parameters in the order of training, all of one structure; read one at a time.
        data: As for `estimate_llc`.
        key: An int seed or a jax random key, the same at every checkpoint.
        nbeta: n times the inverse temperature; n / log n when left out.
        localization: As for `estimate_llc`.
        config: A `VIConfig`, or anything `VIConfig.create` reads.
        num_chains: Independent fits.
        progress: As for `estimate_llc`.
        throw: Whether to raise at a checkpoint whose fit or evaluation is not finite; otherwise its
            estimate is not finite, a finding says so, and the next fit begins at the last one that
            is.
        warm_start: Whether to begin at the q before; otherwise every fit begins at the curvature.
        warm_steps: Steps of every fit but the first, at most; those of the first when left out.
        resume_from: Folder in which each finished estimate is kept, and from which those that are
            there are taken, of the same checkpoints, data and settings. With `warm_start`, the
            first fit after them begins at the curvature, as the first of a curve.
        **overrides: Fields of `VIConfig`.

    Returns:
        The estimates; only the last one can be corrected later, and none that was taken from a
        folder.

    Raises:
        ConfigError: If `warm_steps` is below 1, or without `warm_start`; or if `resume_from` holds
            estimates of something else, or another process writes there.
        DataError: If there is no checkpoint, or they are not of one model. Any error at a
            checkpoint, or while it is read, names it in a note, and its attribute `partial` is the
            curve of those before.

    Cost:
        One estimate for each checkpoint, `total_fge` of the curve. On digits warm starts took a
        third to two fifths of the work of cold ones. One checkpoint is in memory at a time.
    """
    if isinstance(checkpoints, Mapping):
        raise DataError(
            "checkpoints must be an iterable of parameters; got a mapping. Pass a list, such as "
            "[params]."
        )
    refuse_a_trace(data, key, nbeta, localization)
    first = VIConfig.create(config, **overrides)
    first.check_asked(overrides)
    later = _later(first, warm_start, warm_steps)
    if first.sampler.chosen_start == "localizer":
        raise ConfigError(
            "llc_curve begins at the fit of the checkpoint before, and "
            f"{first.sampler.named_start} is of walks from the localizer. "
            "Call estimate_llc at each checkpoint: walks share their compiled programs."
        )
    if isinstance(data, Iterator):
        raise DataError(
            "llc_curve reads the data anew at every checkpoint; got an iterator, which can be read "
            "only once. Pass an object whose __iter__ begins anew each time."
        )
    dtype = jnp.dtype(first.dtype)
    data = open_data(data, dtype)  # once for all checkpoints
    data = data if is_stream(data) else check_data(data, dtype=dtype)[0]
    remaining, estimates, structure, before = iter(checkpoints), [], None, None
    splits: list[Split | None] = []
    settings = {"nbeta": nbeta, "localization": localization, "num_chains": num_chains}
    settings |= {"warm_start": warm_start, "warm_steps": warm_steps}
    with kept_members(resume_from, data, first, key=key, **settings) as members:
        try:
            for params in remaining:
                name = f"checkpoint {len(estimates)}"
                kept = members.find(name, loss_fn, params)
                if kept is not None:
                    structure = structure or ravel_loss(loss_fn, params, dtype)[0].structure
                    estimates, splits = [*estimates, kept[0]], [*splits, kept[1]]
                    continue
                target = assemble(
                    loss_fn,
                    params,
                    data,
                    nbeta,
                    localization,
                    # Until a fit is finite, there is no q to begin at.
                    later if before else first,
                    as_key(key),
                    may_walk=False,
                    check_structure=structure
                    and functools.partial(_check_same, structure, len(estimates)),
                )
                structure = target.objective.structure
                estimate = run_estimate(
                    target,
                    num_chains,
                    progress=progress,
                    throw=throw,
                    warm=before if warm_start else None,
                )
                before = estimate.fitted if np.isfinite(estimate.llc) else before
                split = split_llc(estimate) if _can_split(estimate) else None
                members.keep(name, estimate, split)
                # these hold data and walkers on the device: the last estimate alone keeps them
                live = dict.fromkeys(LIVE)
                light = (dataclasses.replace(one, **live) for one in estimates)
                estimates, splits = [*light, estimate], [*splits, split]
        except BaseException as error:
            error.add_note(
                f"fastvi: at checkpoint {len(estimates)} (from 0); `partial` of this error holds "
                "those before it."
            )
            partial = LLCCurve(tuple(estimates), tuple(splits))
            error.partial = partial  # pyright: ignore[reportAttributeAccessIssue]
            raise
    if not estimates:
        raise DataError("llc_curve needs at least one checkpoint; got none.")
    return LLCCurve(tuple(estimates), tuple(splits))


def _can_split(estimate: LLCEstimate) -> bool:
    """Say whether walkers tell drift from spread."""
    ensemble = estimate.ensemble
    if ensemble is None or not np.isfinite(estimate.llc):
        return False
    return points_of(ensemble.displacement.shape[0]) > 0


def _check_same(expected: TreeStructure, number: int, structure: TreeStructure) -> None:
    """Refuse a checkpoint whose parameters are not of the structure before."""
    if structure.num_parameters != expected.num_parameters:
        raise DataError(
            f"checkpoint {number} has {structure.num_parameters} parameters, the one before "
            f"{expected.num_parameters}; they must be checkpoints of one model."
        )
    if (structure.treedef, structure.shapes) != (expected.treedef, expected.shapes):
        raise DataError(
            f"checkpoint {number} has parameters {structure.treedef} of shapes {structure.shapes}, "
            f"the one before {expected.treedef} of shapes {expected.shapes}; they must be "
            "checkpoints of one model."
        )


def _later(settings: VIConfig, warm_start: Given[bool], warm_steps: Given[int | None]) -> VIConfig:
    """Return the configuration of the fits after the first."""
    if warm_steps is None:
        return settings
    if not warm_start:
        raise ConfigError(
            "warm_steps is of fits that begin at another's q; got warm_start=False. Leave one out."
        )
    return settings.replace(steps=check_count("warm_steps", warm_steps))
