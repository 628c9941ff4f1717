"""Tables of runs: for a terminal, as CSV, and what they show of each run."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvi._numbers import with_error
from fastvi.results.estimate import LLCEstimate

Row = Mapping[str, str]
WIDTH = 80  # columns of a terminal that nobody has widened


def describe(result: LLCEstimate) -> dict[str, str]:
    """Return what a table says of a run."""
    of_q = {"q alone": "-", "elbo": "-", "k-hat": "-"}
    if result.has_fit:
        of_q = {
            "q alone": with_error(result.llc_vi, result.llc_vi_sem),
            "elbo": f"{result.elbo:.2f}",
            "k-hat": f"{result.importance.khat:.2g}",
        }
    return {
        "llc": result.llc_text,
        **of_q,
        "FGE": f"{result.work.total_fge:.0f}",
        "s": f"{result.timings.total:.0f}",
        # The column is narrow: notes are left to the summary.
        "findings": " ".join(one.name for one in result.health if one.severity != "note") or "-",
    }


def format_table(rows: Sequence[Row], width: int = WIDTH) -> list[str]:
    """Align the columns; the last is cut to the width, with an ellipsis."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [names, *[[row[name] for name in names] for row in rows]]
    text = (
        "  ".join(
            f"{cell:<{widths[name]}}" for name, cell in zip(names, line, strict=True)
        ).rstrip()
        for line in lines
    )
    # An ellipsis tells that something was cut; a line that wraps would break the columns.
    return [line if len(line) <= width else line[: width - 1].rstrip() + "…" for line in text]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows with a header."""
    # The csv module writes its own line ends.
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
