"""`estimate_parts`: the learning coefficients of several parts of the weights, in one call."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from fastvi._modes import in_own_modes
from fastvi._typing import Batch, Given, PyTree
from fastvi.api.arguments import check_dtype
from fastvi.api.estimate import estimate_target
from fastvi.api.series import kept_members
from fastvi.api.walk import refuse_beside_walk
from fastvi.config import VIConfig
from fastvi.fitting.protocols import Progress
from fastvi.results.estimate import LLCEstimate
from fastvi.results.part_estimates import PartEstimates
from fastvi.target.containers import hold_data
from fastvi.target.data import hold
from fastvi.target.inputs import refuse_a_trace
from fastvi.target.preview import masks_by_name
from fastvi.target.restrict import restrict_to_each


@in_own_modes
def estimate_parts(
    loss_fn: Given[Callable[[PyTree, Batch], Any]],
    params: PyTree,
    data: Given[Batch],
    parts: Given[Mapping[str, Any]],
    *,
    key: Any = 0,
    nbeta: Given[float | None] = None,
    localization: Given[float | None] = None,
    config: Any = None,
    num_chains: Given[int | None] = None,
    progress: Given[bool | Callable[[Progress], None]] = True,
    throw: Given[bool] = True,
    resume_from: Given[str | os.PathLike[str] | None] = None,
    **overrides: Any,
) -> PartEstimates:
    """Estimate the learning coefficient of each part of the weights, the others held at w*.

    The parts share the data and the weights on the device. Parts whose arrays that vary have the
    same shapes, such as the heads of all layers, share compiled programs. All estimates have the
    same key, so that walkers of parts of one shape read the same examples.

    Args:
        loss_fn: As for `estimate_llc`.
        params: Trained parameters w*, whole.
        data: As for `estimate_llc`, held in memory.
        parts: By name, patterns as `select_part` takes them, or masks as `restrict` takes them.
            `attention_heads` makes those of heads.
        key: An int seed or a jax random key, the same for all parts.
        nbeta: As for `estimate_llc`.
        localization: As for `estimate_llc`.
        config: As for `estimate_llc`; a budget is that of each part.
        num_chains: As for `estimate_llc`.
        progress: As for `estimate_llc`.
        throw: Whether to raise at a part that is not finite; otherwise a finding says so.
        resume_from: Folder in which each finished estimate is kept, and from which those that are
            there are taken, of the same parts, parameters, data and settings.
        **overrides: Fields of `VIConfig`.

    Returns:
        The estimates by name; `print(found.summary())`. Each is one of `estimate_llc` with the mask
        of its part, which `sample_posterior` goes on from unless it was taken from a folder.

    Raises:
        ConfigError: If a part names nothing or does not fit the parameters, or as for
            `estimate_llc`; or if `resume_from` holds estimates of something else, or another
            process writes there.
        DataError: As for `estimate_llc`, or if data do not fit into memory. Any error at a part
            names it in a note, and its attribute `partial` holds the estimates of those before.
        NonFiniteError: As for `estimate_llc`.

    Cost:
        That of an estimate for each part. Programs of parts that share them differentiate all
        arrays that vary in one of these parts, which is never more than a gradient of all weights.
        Memory: one copy of data and weights, and the walkers of each part.
    """
    refuse_a_trace(params, data, key, nbeta, localization)
    settings = VIConfig.create(config, **overrides)
    settings.check_asked(overrides)
    refuse_beside_walk(settings.sampler, [] if num_chains is None else ["num_chains"])
    masks = masks_by_name(params, parts)
    restricted = restrict_to_each(loss_fn, params, list(masks.values()))
    held = hold(hold_data(data, dtype=check_dtype(settings))[0])
    beside = {"nbeta": nbeta, "localization": localization, "num_chains": num_chains}
    found: dict[str, LLCEstimate] = {}
    with kept_members(resume_from, held, settings, key=key, **beside) as members:
        for name, (loss, free) in zip(masks, restricted, strict=True):
            try:
                kept = members.find(name, loss, free)
                if kept is not None:
                    found[name] = kept[0]
                    continue
                result = estimate_target(
                    loss,
                    free,
                    held,
                    key,
                    nbeta,
                    localization,
                    settings,
                    num_chains=num_chains,
                    progress=progress,
                    throw=throw,
                )
                members.keep(name, result)
            except BaseException as error:
                error.add_note(
                    f"fastvi: at part {name!r}; `partial` of this error holds the parts before it."
                )
                error.partial = PartEstimates(found)  # pyright: ignore[reportAttributeAccessIssue]
                raise
            found[name] = result.of_masked(True)
    return PartEstimates(found)
