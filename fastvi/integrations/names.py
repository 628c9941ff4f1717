"""Names in errors."""

from collections.abc import Sequence

MOST_NAMES = 5  # with half of them a whole layer is not seen; twice as many are a page


def few(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
