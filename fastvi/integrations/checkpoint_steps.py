"""Steps of checkpoints, as their names tell them."""

import glob
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fastvi._errors import DataError

# Words before the number of a step, the surest first: a name may have several, as in
# "epoch=3-step=500".
WORDS = {
    "step": "step",
    "epoch": "epoch",
    "iter": "(?<![a-z])iter(?:ation)?",  # no end of "writer"
    "checkpoint": "ckpt|checkpoint",
}
# What has digits and is no step: fractions such as 0.5, .5 and 1e-4, and versions such as v2.
NO_STEPS = re.compile(
    r"(?:\d+|(?<=[=_-]))(?:\.\d+)+(?:e[+-]?\d+)?|\d+e-\d+|(?<![a-z])v\d+", re.IGNORECASE
)
NO_NAME_HAS = "\0"
# The word that counts, or "" where there is none, and the number.
Step = tuple[str, int]
NO_STEP: Step = "", -1
IN_A_LIST = "or pass a list, [load_checkpoint(path) for path in paths]"


def order_by_step(paths: Sequence[Path]) -> dict[int, Path]:
    """Return paths by the steps in their names, the first step first.

    Raises:
        DataError: If a name tells no step, or several; if names count by different words; or if two
            tell the same step.
    """
    told = {path: _read_step(path) for path in sorted(paths)}
    _check_all_tell(told)
    _check_one_word(told)
    by_step: dict[int, Path] = {}
    for path, (_, step) in told.items():
        if step in by_step:
            one = by_step[step]
            raise DataError(
                f"{one.name} and {path.name} are both of step {step}. "
                + _way_out([one, path], told, len({step for _, step in told.values()}))
            )
        by_step[step] = path
    return dict(sorted(by_step.items()))


def _read_step(path: Path) -> Step:
    words = NO_STEPS.sub(NO_NAME_HAS, _stem(path))
    for word, spelled in WORDS.items():
        numbers = re.findall(rf"(?:{spelled})s?[^a-z\d{NO_NAME_HAS}]*(\d+)", words, re.IGNORECASE)
        if numbers:
            return word, _only(numbers, path)
    # One that stands alone goes before one that ends a word, as in resnet18_500.
    numbers = re.findall(r"(?<![a-zA-Z\d])\d+", words) or re.findall(r"\d+", words)
    return ("", _only(numbers, path)) if numbers else NO_STEP


def _only(numbers: list[str], path: Path) -> int:
    steps = sorted({int(number) for number in numbers})
    if len(steps) > 1:
        raise DataError(
            f"the name of {path} may tell step {steps[0]} or {steps[1]}. Rename it, such as "
            f"step_{steps[1]}{path.suffix if path.is_file() else ''}, {IN_A_LIST}."
        )
    return steps[0]


def _check_all_tell(told: dict[Path, Step]) -> None:
    for path, step in told.items():
        if step == NO_STEP:
            others = [other for other in told if told[other] != NO_STEP]
            way_out = _way_out(others[:1], told) if others else "Rename it, such as step_100."
            raise DataError(f"no number in the name of {path} tells its step. {way_out}")


def _check_one_word(told: dict[Path, Step]) -> None:
    first: dict[str, Path] = {}
    for path, (word, _) in told.items():
        first.setdefault(word, path)
    if len(first) > 1:
        one, other = [*first.values()][:2]
        raise DataError(
            f"{one.name} and {other.name} do not count alike, and have no common order. "
            + _way_out([one, other], told)
        )


def _way_out(paths: list[Path], told: dict[Path, Step], fewest: int = 1) -> str:
    """Name patterns of paths that leave the fewest steps or more, in an order."""
    patterns = []
    for path in paths:
        for pattern in (_pattern(path, "*"), _pattern(path, "[0-9]*")):
            left = [step for one, step in told.items() if fnmatchcase(one.name, pattern)]
            if _has_order(left) and len(left) >= fewest:
                patterns.append(f'"{pattern}"')
                break
    if not patterns:
        return f"Move one of them out of the folder, {IN_A_LIST}."
    return f"Choose by pattern, such as pattern={' or '.join(patterns)}."


def _has_order(steps: list[Step]) -> bool:
    words = {word for word, _ in steps}
    return NO_STEP not in steps and len(words) == 1 and len(set(steps)) == len(steps)


def _pattern(path: Path, number: str) -> str:
    """Return the name with another text for each number."""
    stem = _stem(path)
    parts = re.split(r"\d+(?:\.\d+)*", stem)
    return number.join(map(glob.escape, parts)) + path.name[len(stem) :]


def _stem(path: Path) -> str:
    return path.name.removesuffix(path.suffix) if path.is_file() else path.name
