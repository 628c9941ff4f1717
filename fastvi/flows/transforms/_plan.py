"""How a chain of blocks runs.

Permutations folded into the order of rows, equal blocks in one loop.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Any
from fastvi.flows._columns import Order, inverse_order
from fastvi.flows.transforms.base import AbstractTransform
from fastvi.flows.transforms.permutation import Permutation


class Segment(NamedTuple):
    """`count` repetitions of: each core in turn, then its order of rows.

    Attributes:
        cores: Transforms in natural order.
        orders: Order of rows after each core.
        indices: For each core, the blocks whose parameters it takes in turn.
        after: Order of rows after the last repetition.
    """

    cores: tuple[AbstractTransform, ...]
    orders: tuple[Order, ...]
    indices: tuple[tuple[int, ...], ...]
    after: Order


class Plan(NamedTuple):
    """Order of rows at the start, then segments."""

    before: Order
    segments: tuple[Segment, ...]


def make_plan(blocks: Sequence[AbstractTransform], params: Sequence[Any]) -> Plan:
    """Find the orders of rows between blocks, and runs of equal structure and shapes."""
    places, orders = _orders(blocks, blocks[0].dim)
    cores = [blocks[place].core() for place in places]
    kinds = [(core, _shapes(params[place])) for core, place in zip(cores, places, strict=True)]
    segments, start = [], 0
    while start < len(places):
        period, count = _longest_run(kinds, orders, start)
        end = start + period * count
        inner = orders[start + 1 : start + period + 1]
        # the last repetition ends in another order than those before it
        undo = inverse_order(inner[-1])
        segments.append(
            Segment(
                cores=tuple(cores[start : start + period]),
                orders=tuple(inner),
                indices=tuple(tuple(places[start + j : end : period]) for j in range(period)),
                after=tuple(undo[i] for i in orders[end]),
            )
        )
        start = end
    return Plan(orders[0], tuple(segments))


def _orders(blocks, dim):
    """Return the indices of blocks other than permutations, and the orders of rows.

    There is an order before each of these blocks, and one at the end.
    """
    # Row i holds the feature that the next block knows as number layout[i].
    layout, places, orders = np.arange(dim), [], []

    def arrange(wanted):
        nonlocal layout
        inverse = np.argsort(layout)
        layout = np.asarray(wanted)
        return tuple(int(i) for i in inverse[layout])

    for place, block in enumerate(blocks):
        if isinstance(block, Permutation):
            # A permutation moves no row: it gives the features other numbers.
            layout = np.argsort(np.asarray(block.perm))[layout]
            continue
        places.append(place)
        orders.append(arrange(block.order))
    orders.append(arrange(np.arange(dim)))
    return places, orders


def _shapes(params: Any) -> Hashable:
    leaves, structure = jax.tree_util.tree_flatten(params)
    return structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _longest_run(kinds, orders, start):
    """Return the period and count, from `start`, of the repetition that covers most blocks.

    (1, 1) if none does.
    """
    best = (1, 1)
    # the orders of alternating masks repeat after two layers
    for period in range(1, (len(kinds) - start) // 2 + 1):
        length = period
        while start + length < len(kinds) and _continues(kinds, orders, start, period, length):
            length += 1
        count = length // period
        if count > 1 and period * count > best[0] * best[1]:
            best = (period, count)
    return best


def _continues(kinds, orders, start, period, length):
    here, earlier = start + length, start + length - period
    # The order before the first repetition belongs to what comes before the loop.
    return kinds[here] == kinds[earlier] and (length == period or orders[here] == orders[earlier])
