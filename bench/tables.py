"""Numbers and tables of the pages that `bench.report` writes."""

EFFICIENCY = {  # heads of the columns of estimates that compare problems
    "relative variance x FGE": "relative_wnv",
    "relative squared error x FGE": "relative_wnmse",
    "FGE/s": "fge_per_second",
}


def number(text):
    """Format with three digits; what was not measured stays empty."""
    if text in ("", "nan"):
        return ""
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(header, lines):
    """Lay out a table."""
    body = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]]
    return "\n".join(body)


def tabulate(header, lines):
    """Lay out a table, or say that there is nothing to lay out."""
    return markdown(header, lines) if lines else "Nothing measured yet."
