"""What a run spends, in sample gradients: one example's gradient at one point is 1."""

from fastvi.sampling.gradients import PAIR, block_size
from fastvi.target.work import GRADIENT


def step_cost(num_data: int, num_blocks: int, walkers: int, kept: int = 0) -> float:
    """Price one step of all walkers: each takes the gradients of blocks of its own.

    Examples that are `kept` are evaluated beside the blocks.
    """
    if num_blocks == 1:
        return GRADIENT * walkers * num_data
    # A loss that is evaluated with its gradient costs nothing more.
    return GRADIENT * walkers * (PAIR * block_size(num_data - kept, num_blocks) + kept)


def anchor_cost(num_data: int, num_blocks: int) -> float:
    """Price the gradients of all blocks at one point, which all data at once do not need."""
    return GRADIENT * num_data if num_blocks > 1 else 0


def run_cost(num_data: int, num_blocks: int, walkers: int, steps: int, kept: int = 0) -> float:
    """Price a run that begins with blocks: the anchor, the walkers' first gradients, and steps."""
    return anchor_cost(num_data, num_blocks) + (1 + steps) * step_cost(
        num_data, num_blocks, walkers, kept
    )
