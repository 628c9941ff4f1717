"""The ledger of work, and the only prices in it.

The unit is the sample gradient: the gradient of one example's loss at one point. Walkers, draws and
chains that share a batch count each. A full-gradient equivalent (FGE) is n sample gradients.
"""

import dataclasses
from typing import Any

GRADIENT = 1.0
# Reverse mode costs about twice the forward pass on top of it. At half the price the budget of a
# run would allow more losses than it has time for; at double the price it would stop early.
LOSS = 1 / 3
# Forward over reverse differentiates a gradient once more, which about doubles its operations.
HESSIAN_PRODUCT = 2.0


@dataclasses.dataclass(frozen=True)
class Work:
    """Evaluations of one example each, counted by kind.

    Attributes:
        gradients: Gradients of one example's loss at one point, its value included.
        losses: Values of one example's loss at one point.
        hessian_products: Products of one example's Hessian with one vector.
    """

    gradients: Any = 0
    losses: Any = 0
    hessian_products: Any = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.gradients + other.gradients,
            self.losses + other.losses,
            self.hessian_products + other.hessian_products,
        )

    @property
    def sample_gradients(self) -> Any:
        """The price of all of it, in sample gradients."""
        return (
            GRADIENT * self.gradients + LOSS * self.losses + HESSIAN_PRODUCT * self.hessian_products
        )

    def fge(self, num_data: int) -> Any:
        """The same price in full-gradient equivalents of `num_data` examples."""
        return self.sample_gradients / num_data
