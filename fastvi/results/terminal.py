"""Write to a terminal, a pipe or a file that may be closed, full, or without the letters.

That never ends the work. And how numbers are written there.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TextIO

SPELLED = {
    "±": "+-", "…": "...", "·": "-", "−": "-", "–": "-", "—": "-", "×": "x", "\u00a0": " ",
    "λ": "lambda", "β": "beta", "γ": "gamma", "σ": "sigma",
    "²": "^2", "√": "sqrt", "≤": "<=", "≥": ">=", "≈": "~", "→": "->",
}  # fmt: skip


def spell(text: str, encoding: str | None) -> str:
    """Return the text as an encoding can write it.

    `±` becomes `+-` in ASCII, what has no spelling `?`.
    """
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        # Only here: a terminal that has the letters shows them.
        plain = "".join(SPELLED.get(letter, letter) for letter in text)
        return plain.encode(encoding, "replace").decode(encoding)
    # A stream may name an encoding that Python does not know.
    except LookupError:
        return spell(text, "ascii")
    return text


def write_text(stream: TextIO | None, text: str) -> str | None:
    """Write and flush; return why it could not be done, None where it was."""
    # Python has no stream where the process was started with the descriptor closed.
    if stream is None:
        return "it is closed"
    try:
        stream.write(spell(text, getattr(stream, "encoding", None)))
        stream.flush()
    # A broken pipe or a full disk is an OSError, a closed stream a ValueError.
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


def is_terminal(stream: TextIO | None) -> bool:
    """Say whether a stream is shown to a person as it is written."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def is_notebook(stream: TextIO | None) -> bool:
    """Say whether a stream is shown below the cell of a notebook."""
    return type(stream).__module__.partition(".")[0] == "ipykernel"


def warn(line: str) -> None:
    """Tell something on stderr if that is possible."""
    write_text(sys.stderr, f"{line}\n")


def flush_streams() -> None:
    """Flush stdout and stderr, and connect to the null device each that cannot be written.

    Python flushes them once more when the process ends, and would fail then.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and write_text(stream, "") is not None:
            # A stream may have no descriptor, or be closed.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return a table: names and the last column to the left, numbers between them to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number in (0, len(row) - 1) else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
