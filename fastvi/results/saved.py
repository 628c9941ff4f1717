"""The files of a saved estimate: their format, and the checks at reading."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from fastvi._errors import ConfigError
from fastvi.config import VIConfig
from fastvi.results import files
from fastvi.results.findings import SEVERITIES, Finding
from fastvi.results.parts import DrawValues
from fastvi.results.schema import COUNT, NONNEGATIVE, POSITIVE, Rule, build, wrong_field

RESULT_FILE, TRACES_FILE = "result.json", "traces.npz"
FORMAT, VERSION = "fastvi estimate", 8
# `arrays_digest` ties result.json to its traces.npz: two files are not replaced at once.
HEADER = ("format", "version", "arrays_digest")
# fields of arrays by name, and the prefix of their names in the file
ARRAY_GROUPS = {
    "traces": "trace_",
    "draws": "draw_",
    "family_arrays": "family_",
    "snapshots": "snapshot_",
}
SINGLE_ARRAYS = ("log_weights", "walk_llc")
LIVE = ("fitted", "ensemble", "going_on")  # hold the loss and the data, which are the caller's own
ELSEWHERE = ("config", *LIVE, *SINGLE_ARRAYS, *ARRAY_GROUPS)  # than among the plain values
NON_FINITE = ("nan", "inf", "-inf")
WAY_OUT = "Restore both files of the estimate from a copy, or run it again."

RULES = {
    "nbeta": POSITIVE,
    "localization": NONNEGATIVE,
    "n_data": COUNT,
    "dim": COUNT,
    "llc_per_chain": Rule("a list of numbers, one or more", lambda value: len(value) > 0),
    "timings": Rule("seconds by name", lambda value: all(map(NONNEGATIVE.holds, value.values()))),
    "health": Rule("findings", lambda value: all(item["severity"] in SEVERITIES for item in value)),
    "correction": Rule(
        "a reweighted or sampled average",
        lambda value: value is None or value.get("method") in ("reweight", "sample"),
    ),
}


def write_estimate(result: Any, folder: Path) -> None:
    """Write both files, tied by a digest; the estimate is complete when result.json is there."""
    names = (field.name for field in dataclasses.fields(result) if field.name not in LIVE)
    values = {name: getattr(result, name) for name in names}
    values |= {"config": result.config.to_dict(), "draws": result.draws._asdict()}
    arrays: dict[str, Any] = {name: np.asarray(values.pop(name)) for name in SINGLE_ARRAYS}
    for group, prefix in ARRAY_GROUPS.items():
        arrays |= {prefix + name: np.asarray(array) for name, array in values.pop(group).items()}
    # The digest is of the arrays, not of the archive, whose bytes tell the time of writing.
    header = dict(zip(HEADER, (FORMAT, VERSION, files.digest_arrays(arrays)), strict=True))
    with files.staged(folder) as staging:
        np.savez_compressed(staging / TRACES_FILE, **arrays)
        (staging / RESULT_FILE).write_bytes(files.json_bytes(header | _plain(values)))
        files.publish(staging, folder, (TRACES_FILE, RESULT_FILE))


def read_estimate(cls: Any, folder: Path) -> dict[str, Any]:
    """Read and check what `write_estimate` wrote, as arguments of the class.

    Raises:
        DataError: If a file is missing, damaged, of another program, version or estimate.
    """
    place = folder / RESULT_FILE
    values = files.read_object(place, f"Pass the folder given to save(). {WAY_OUT}")
    files.check_format(place, values, FORMAT, VERSION, "Run the estimate again with this fastvi.")
    digest = values.get("arrays_digest")
    # NaN is no JSON: it is restored before the check of types, which its stand-in would not pass.
    values = _restored({name: value for name, value in values.items() if name not in HEADER}, place)
    arrays = files.read_arrays(folder / TRACES_FILE, WAY_OUT)
    if files.digest_arrays(arrays) != digest:
        raise files.damaged(
            folder / TRACES_FILE, f"does not belong to {RESULT_FILE} beside it", WAY_OUT
        )
    values |= {name: arrays[name] for name in SINGLE_ARRAYS if name in arrays}
    for group, prefix in ARRAY_GROUPS.items():
        values[group] = {
            k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
        }
    _check_values(cls, place, values)
    _check_arrays(folder / TRACES_FILE, arrays, values)
    hints = get_type_hints(cls)
    kept = {name: values[name] for name in ELSEWHERE if name in values}
    built = {name: build(value, hints[name]) for name, value in values.items() if name not in kept}
    return {**built, **kept, "draws": DrawValues(**values["draws"])}


def _check_values(cls: Any, place: Path, values: dict[str, Any]) -> None:
    """Check what lies in result.json, and make the configuration."""
    # The second reads fields that the first has found to be there.
    wrong = (
        wrong_field(cls, values, RULES, ELSEWHERE)
        or _wrong_walk(values["evaluation"], values["correction"])
        or _wrong_config(values.get("config"))
    )
    if wrong:
        raise files.damaged(place, wrong, WAY_OUT)
    try:
        values["config"] = VIConfig.create(values["config"])
    except ConfigError as error:
        raise files.damaged(place, f"has an impossible config: {error}", WAY_OUT) from error


def _wrong_config(config: Any) -> str | None:
    if not isinstance(config, dict):
        return "lacks 'config', the settings of the fit"
    # A setting left out would take this version's default, which the run may not have had.
    lacking = [field.name for field in dataclasses.fields(VIConfig) if field.name not in config]
    return f"lacks 'config.{lacking[0]}'" if lacking else None


def _wrong_walk(evaluation: Mapping[str, Any], correction: Mapping[str, Any] | None) -> str | None:
    """Say what keeps an estimate without a fit from being a walk; None where nothing does."""
    if evaluation["llc"]:
        return None
    if correction is None or correction["method"] != "sample":
        return "has neither a fit in evaluation.llc nor a walk in correction"
    # Summary and page print these of a walk.
    told = ("walkers", "steps", "burn_in", "batch", "step_size", "rhat", "variance_reduction")
    lacking = [name for name in told if correction[name] is None]
    return f"has correction.{lacking[0]} = None, though it is a walk" if lacking else None


def _check_arrays(place: Path, arrays: Mapping[str, np.ndarray], values: dict[str, Any]) -> None:
    """Check names and shapes of the arrays against each other and against result.json."""
    prefixes = tuple(ARRAY_GROUPS.values())
    draws = [f"draw_{name}" for name in DrawValues._fields]
    chains = len(values["evaluation"]["llc"])
    needed = (*SINGLE_ARRAYS, *draws, *(["trace_elbo"] if chains else []))
    # Without a chain there is no fit, whose arrays the others are.
    unknown = [
        name
        for name, array in arrays.items()
        if array.dtype.kind not in "fiub"
        or name not in needed
        and (not chains or name.startswith("draw_") or not name.startswith(prefixes))
    ]
    wrong = [f"lacks the array {name!r}" for name in needed if name not in arrays]
    wrong += [f"holds {name!r}, no array of it" for name in unknown]
    if wrong:
        raise files.damaged(place, wrong[0], WAY_OUT)
    weights = arrays["log_weights"].shape
    shapes = {
        **{f"trace_{name}": (chains, arrays["trace_elbo"].shape[-1]) for name in values["traces"]},
        "log_weights": (chains, weights[-1] if chains and weights else 0),
        **dict.fromkeys(draws, weights),
    }
    wrong = [
        name
        for name, shape in shapes.items()
        if arrays[name].shape != shape or (chains and 0 in shape)
    ]
    wrong += [] if arrays["walk_llc"].ndim == 2 else ["walk_llc"]
    wrong += [
        f"family_{k}"
        for k, array in values["family_arrays"].items()
        if array.shape[:1] != (chains,)
    ]
    if wrong:
        raise files.damaged(
            place, f"has {wrong[0]!r} of the impossible shape {arrays[wrong[0]].shape}", WAY_OUT
        )


def _plain(value: Any) -> Any:
    """Turn arrays and numpy scalars into lists and numbers.

    JSON has no NaN, so those become strings.
    """
    if isinstance(value, Finding):
        value = dataclasses.asdict(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return {"non_finite": repr(value)}
    return value


def _restored(value: Any, place: Path) -> Any:
    """Undo `_plain` where JSON lacks a value."""
    if isinstance(value, dict):
        # No class of an estimate has a field of this name.
        if set(value) != {"non_finite"}:
            return {name: _restored(item, place) for name, item in value.items()}
        if value["non_finite"] not in NON_FINITE:
            raise files.damaged(
                place, f"has {value['non_finite']!r} where nan, inf or -inf is wanted", WAY_OUT
            )
        return float(value["non_finite"])
    return [_restored(item, place) for item in value] if isinstance(value, list) else value
