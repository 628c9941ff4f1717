"""Traces and figures of a fit as events for TensorBoard."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastvi._errors import DataError
from fastvi._optional import import_optional
from fastvi._typing import Given
from fastvi.config import VIConfig
from fastvi.fitting.protocols import Progress
from fastvi.results.estimate import LLCEstimate
from fastvi.results.flat import SamplerRunResult
from fastvi.results.report.panels import IMAGES, PANELS, render

PREFIX = "vi/"
# Traces that are recorded as they stand at a window's end; others by their mean over it.
STATES = ("cumulative_fge", "lr", "effective_M")
RADIUS_QUANTILES = (0.05, 0.5, 0.95)  # of |w - w*| over draws, a line for each
IMAGE_DPI = 80  # event files hold every image, so they are half as fine as those of a run
MOST_IMAGES = 3  # of each kind before the last: of more than ten TensorBoard shows a part
SHAPES = ("pi", "scree", "D_sqrt")  # images of the family's arrays


class Windows(NamedTuple):
    """Traces reduced to one record for each window of `every` steps.

    `steps` (windows,), values (chains, windows).
    """

    steps: np.ndarray
    values: dict[str, np.ndarray]


def write_events(
    result: Given[LLCEstimate | SamplerRunResult],
    folder: Given[str | os.PathLike[str]],
    *,
    every: Given[int | None] = None,
) -> Path:
    """Write a finished estimate, or the chains of `run_vi`.

    Scalars of the traces, final values, figures.

    The folder itself holds the mean over the chains, `chain_0`, `chain_1`, ... hold each chain,
    under the same tags: TensorBoard lays them over each other. `run_vi` keeps nothing that figures
    are drawn from.

    Figures come every k times `every` steps, k such that there are at most four of a kind. Those of
    weights, scree and D^{1/2}, and the scalar `A_col_norm_p95_<m>` of each component m, need what a
    fit keeps on its way with `tensorboard=True` in its configuration; of another fit they show its
    end alone.

    A walk without a fit has `walk_llc` of each bin of steps, the mean over the walkers in the
    folder itself and each walker in `walker_0`, `walker_1`, ..., then final values and a figure.

    Args:
        result: The estimate, also one that `LLCEstimate.load` read; or what `run_vi` returned.
        folder: Where the event files go; made if need be.
        every: Steps between records; `eval_every` of the configuration, or of its default for
            `run_vi`, when left out.

    Returns:
        The folder.

    Raises:
        DataError: If it is another thing, or `every` is not at least 1.
        MissingExtraError: If tensorboardX or matplotlib is not installed.
    """
    if not isinstance(result, (LLCEstimate, SamplerRunResult)):
        raise DataError(
            f"write_events takes what estimate_llc or run_vi returned; got {type(result).__name__}."
        )
    if every is not None and every < 1:
        raise DataError(f"every must be an integer >= 1; got {every!r}: leave it out.")
    events = Events(folder)
    if isinstance(result, SamplerRunResult):
        _write_chains(events, result, VIConfig().eval_every if every is None else every)
    elif result.has_fit:
        _write_estimate(events, result, result.config.eval_every if every is None else every)
    else:
        _write_walk(events, result)
    events.close()
    return Path(folder)


def _write_chains(events: "Events", result: SamplerRunResult, every: int) -> None:
    """Write what `run_vi` returned, under the tags of an estimate."""
    # VI does not sample `Ln`, which is NaN for the contract of a sampler alone.
    traces = {name: trace for name, trace in result.traces.items() if name != "Ln"}
    events.write_traces(traces, every=every)
    names = ("lambda_hat_mean", "lambda_hat_std", "Eq_Ln_mean", "Ln_wstar", "total_fge")
    final = {name: float(result.work[name]) for name in names}
    last = result.traces["elbo"].shape[1] - 1
    events.write_scalars("mean", last, final | {"llc_mean": final["lambda_hat_mean"]})


def _write_walk(events: "Events", result: LLCEstimate) -> None:
    """Write the walkers of an estimate without a fit, and its final values and figure."""
    length = result.config.filled.sampler.bin_length
    last = result.walk_llc.shape[1] * length - 1
    for place, values in enumerate(np.asarray(result.walk_llc, float).T):
        events.write_each("walker", (place + 1) * length - 1, {"walk_llc": values})
    events.write_scalars("mean", last, _headline(result))
    if PANELS["walk"].applies(result):
        events.write_images(last, {"walk": render("walk", result, IMAGE_DPI)})


def _write_estimate(events: "Events", result: LLCEstimate, every: int) -> None:
    """Write an estimate's traces, its figures along the fit, and its final values and figures."""
    events.write_traces(result.traces, every=every)
    last = result.traces["elbo"].shape[1] - 1
    moments = _moments(result)
    for step, moment in moments.items():
        _write_row_lengths(events, step, moment)
    for step in _image_steps(last + 1, every):
        # A fit that kept nothing on its way has the shape of its end alone, which is not this one.
        early = moments.get(step, dataclasses.replace(result, family_arrays={}))
        upto = {name: trace[:, : step + 1] for name, trace in result.traces.items()}
        events.write_images(
            step, _images(dataclasses.replace(early, traces=upto), (*SHAPES, "radius2_trace"))
        )
    events.write_scalars("mean", last, _headline(result) | {"khat": result.importance.khat})
    events.write_each("chain", last, _final_of_q(result))
    events.write_images(last, _images(result, IMAGES))


def _moments(result: LLCEstimate) -> dict[int, LLCEstimate]:
    """Return, by step, the result with the family's arrays as they were after that step."""
    arrays = dict(result.snapshots)
    steps = arrays.pop("step", np.zeros(0, int)).tolist()
    taken = {
        step: dataclasses.replace(
            result, family_arrays={name: array[:, at] for name, array in arrays.items()}
        )
        for at, step in enumerate(steps)
    }
    return {**taken, result.traces["elbo"].shape[1] - 1: result}


def _image_steps(length: int, every: int) -> range:
    """Return steps before the last, evenly spaced, each the end of a record."""
    # Rounded up, so that there are at most `MOST_IMAGES` of them.
    stride = every * -(-length // (every * (MOST_IMAGES + 1)))
    return range(stride - 1, length - 1, stride)


def _images(result: LLCEstimate, tags: Iterable[str]) -> dict[str, bytes]:
    return {
        tag: render(IMAGES[tag], result, IMAGE_DPI)
        for tag in tags
        if PANELS[IMAGES[tag]].applies(result)
    }


def _write_row_lengths(events: "Events", step: int, result: LLCEstimate) -> None:
    """Write the 95 % point of the norms of each component's factor rows."""
    if "factor_norm2" not in result.family_arrays:
        return
    ordered = np.sqrt(-np.sort(-np.asarray(result.family_arrays["factor_norm2"], float), axis=2))
    # Components of a smaller rank are filled up with rows of length 0, which are left out.
    lengths = {
        f"A_col_norm_p95_{m}": np.quantile(ordered[:, m, :rank], 0.95, axis=1)
        for m, rank in enumerate(result.config.ranks)
        if rank
    }
    events.write_each("chain", step, lengths)


class Events:
    """Event files of one run.

    The mean over the chains in the folder, each chain in one of its own below.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        named = {
            "extra": "tensorboard",
            "distribution": "tensorboardX",
            "purpose": "TensorBoard",
        }
        self._proto = import_optional("tensorboardX.proto.summary_pb2", **named)
        self._writer = import_optional("tensorboardX.writer", **named).FileWriter
        self._folder = Path(folder)
        self._files: dict[str, Any] = {}

    def write_traces(self, traces: Mapping[str, Any], *, every: int, first_step: int = 0) -> None:
        """Write traces of shape (chains, steps), one record for every `every` steps."""
        windows = reduce_traces(traces, every, first_step)
        for index, step in enumerate(windows.steps):
            each = {name: values[:, index] for name, values in windows.values.items()}
            self.write_each("chain", int(step), each)

    def write_each(self, kind: str, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Write the mean of values of shape (chains,), and each beside it, as `kind_0`, ..."""
        self.write_scalars("mean", step, {name: row.mean() for name, row in values.items()})
        for place, one in enumerate(zip(*values.values(), strict=True)):
            self.write_scalars(f"{kind}_{place}", step, dict(zip(values, one, strict=True)))

    def write_scalars(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Write one event that holds all values of a step."""
        summary = self._proto.Summary()
        for name, value in values.items():
            summary.value.add(tag=PREFIX + name, simple_value=float(value))
        self._file(run).add_summary(summary, step)

    def write_images(self, step: int, images: Mapping[str, bytes]) -> None:
        """Write PNG images beside the means."""
        summary = self._proto.Summary()
        for name, png in images.items():
            # A PNG's header has them at bytes 16 and 20, so that no image library is needed.
            width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
            # A colorspace of 4 is RGBA to TensorBoard.
            image = self._proto.Summary.Image(
                width=width, height=height, colorspace=4, encoded_image_string=png
            )
            summary.value.add(tag=PREFIX + name, image=image)
        self._file("mean").add_summary(summary, step)

    def flush(self) -> None:
        """Make what is written visible to readers."""
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Flush and close the files."""
        for file in self._files.values():
            file.close()

    def _file(self, run: str) -> Any:
        if run not in self._files:
            self._files[run] = self._writer(
                str(self._folder if run == "mean" else self._folder / run)
            )
        return self._files[run]


class LiveEvents:
    """Write traces while a fit runs.

    Pass it as `progress` to `estimate_llc`, and close it afterwards.

    Examples:
        `with LiveEvents("runs/tb") as live: estimate_llc(loss_fn, params, data, progress=live)`
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int = 50):
        self._events, self._every = Events(folder), every

    def __call__(self, progress: Progress) -> None:
        """Write the steps since the last report."""
        # Other stages than the fit have none.
        if progress.traces:
            steps = next(iter(progress.traces.values())).shape[1]
            self._events.write_traces(
                progress.traces, every=self._every, first_step=progress.step - steps
            )
            self._events.flush()

    def __enter__(self) -> "LiveEvents":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files."""
        self._events.close()


def reduce_traces(traces: Mapping[str, Any], every: int, first_step: int = 0) -> Windows:
    """Reduce traces to windows of `every` steps, and add quantiles of radius2 over each.

    The last window may be shorter.
    """
    arrays = {name: np.asarray(trace, float) for name, trace in traces.items()}
    length = next(iter(arrays.values())).shape[1]
    starts = np.arange(0, length, every)
    ends = np.minimum(starts + every, length)
    values = {
        name: array[:, ends - 1]
        if name in STATES
        else np.add.reduceat(array, starts, axis=1) / (ends - starts)
        for name, array in arrays.items()
    }
    if "radius2" in arrays:
        for level in RADIUS_QUANTILES:
            columns = [
                np.quantile(arrays["radius2"][:, begin:end], level, axis=1)
                for begin, end in zip(starts, ends, strict=True)
            ]
            values[f"radius2_q{100 * level:02.0f}"] = np.stack(columns, axis=1)
    return Windows(first_step + ends - 1, values)


def _final_of_q(result: LLCEstimate) -> dict[str, np.ndarray]:
    """Values of q's own, of shape (chains,)."""
    own = {name: np.asarray(values, float) for name, values in result.evaluation._asdict().items()}
    return {
        "llc_vi": own["llc"],
        "Eq_Ln_mc": result.init_loss + own["llc_mc"] / result.nbeta,
        "Eq_Ln_cv": result.init_loss + own["llc"] / result.nbeta,
        "variance_reduction": own["variance_reduction"],
    }


def _headline(result: LLCEstimate) -> dict[str, float]:
    """Values that an estimate has with and without a fit."""
    return {
        "llc": result.llc,
        "lambda_hat": result.llc,
        "llc_mean": result.llc,
        "lambda_hat_mean": result.llc,
        "L0": result.init_loss,
        "Ln_wstar": result.init_loss,
        "Eq_Ln_final": result.init_loss + result.llc / result.nbeta,
    }
