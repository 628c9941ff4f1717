"""What a run spends, in sample gradients: one example's gradient at one point is 1."""

from fastvi.sampling.gradients import block_size


def step_cost(num_data: int, num_blocks: int, walkers: int) -> int:
    """Price one step of all walkers: each takes the gradient of a block of its own."""
    return walkers * block_size(num_data, num_blocks)


def anchor_cost(num_data: int, num_blocks: int) -> int:
    """Price the gradients of all blocks at one point, which all data at once do not need."""
    return num_data if num_blocks > 1 else 0


def noise_cost(num_data: int, counts: tuple[int, ...], points: int) -> int:
    """Price a measurement of the gradient noise on the smallest blocks, at an anchor and points."""
    return (1 + points) * anchor_cost(num_data, counts[0])


def run_cost(num_data: int, num_blocks: int, walkers: int, steps: int) -> int:
    """Price a run that begins with blocks: the anchor, the walkers' first gradients, and steps."""
    return anchor_cost(num_data, num_blocks) + (1 + steps) * step_cost(
        num_data, num_blocks, walkers
    )
