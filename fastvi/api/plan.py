"""The plan of an estimate: every open choice made, by pure functions."""

PASSES = 20_000  # full passes over the data that a budget is worth where nobody gives one
# Sample gradients of an estimate from data of unknown size; ten times what an estimate of a
# language model usually pays. Half of it ends a hard one early, twice as much only bounds later.
BUDGET_OF_UNKNOWN_DATA = 1e6


def default_budget(num_data: int | None) -> float:
    """Return the most sample gradients of an estimate that names no budget."""
    return BUDGET_OF_UNKNOWN_DATA if num_data is None else float(PASSES * num_data)
