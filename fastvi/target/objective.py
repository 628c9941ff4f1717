"""Losses on a flat parameter vector, as the rest of the package calls them.

An objective sees `w`, a vector of shape (dim,), and a batch: a pytree of arrays with a common
leading axis of examples.
"""

import abc
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax

from fastvi._errors import DataError
from fastvi._modes import call_in_their_modes, their_products
from fastvi._typing import Array, Batch, Float, Given, Scalar, Vector
from fastvi.target.losses import example_losses, mean_loss, raw_examples

LossFn = Callable[..., Any]


@runtime_checkable
class FlatObjective(Protocol):
    """Mean loss per example, in nats, on a flat parameter vector and a batch.

    It may also have `value_and_grad(w, batch)`, which returns both at the price of the gradient.
    """

    def loss(self, w: Float[Array, " dim"], batch: Batch, /) -> Scalar:
        """Evaluate the mean loss of the batch."""
        ...

    def grad(self, w: Float[Array, " dim"], batch: Batch, /) -> Float[Array, " dim"]:
        """Differentiate `loss` with respect to `w`."""
        ...


def value_and_grad(objective: FlatObjective, w: Vector, batch: Batch) -> tuple[Scalar, Vector]:
    """Evaluate the loss and its gradient, in one pass where the objective can."""
    both = getattr(objective, "value_and_grad", None)
    with their_products():
        if both is None:
            return objective.loss(w, batch), objective.grad(w, batch)
        return both(w, batch)


class AbstractObjective(abc.ABC):
    """A `FlatObjective` around a function of a person's, differentiated by autodiff."""

    @abc.abstractmethod
    def outputs(self, w: Vector, batch: Batch) -> Any:
        """Return what the function returns on the batch."""

    @property
    def has_own_gradient(self) -> bool:
        """Say whether a function other than autodiff of the loss gives the gradient."""
        return False

    def loss(self, w, batch):
        """Evaluate the mean loss of the batch."""
        return mean_loss(self.outputs(w, batch), batch, w.dtype)

    def example_losses(self, w, batch):
        """Return each example's share in the mean, None where the function returns the mean."""
        return example_losses(self.outputs(w, batch), batch, w.dtype)

    def grad(self, w, batch):
        """Differentiate the loss with respect to `w`."""
        return jax.grad(self.loss)(w, batch)

    def value_and_grad(self, w, batch):
        """Evaluate loss and gradient in one pass."""
        return jax.value_and_grad(self.loss)(w, batch)


@dataclasses.dataclass(frozen=True)
class CallableObjective(AbstractObjective):
    """A `FlatObjective` made of plain functions of a flat vector.

    Equal functions make equal (and cached) objectives.
    """

    loss_fn: LossFn
    grad_fn: LossFn | None = None

    @property
    def has_own_gradient(self) -> bool:
        """Say whether a gradient was given."""
        return self.grad_fn is not None

    def outputs(self, w, batch):
        """Return what the function returns on the batch."""
        return call_in_their_modes(self.loss_fn, w, raw_examples(batch))

    def grad(self, w, batch):
        """Differentiate the loss: by the given function if there is one."""
        if self.grad_fn is None:
            return super().grad(w, batch)
        # A weighted loss may have no gradient of its own, so the batch is as it was given.
        return call_in_their_modes(self.grad_fn, w, batch)

    def value_and_grad(self, w, batch):
        """Evaluate loss and gradient, in one pass where no gradient was given."""
        if self.grad_fn is None:
            return super().value_and_grad(w, batch)
        return self.loss(w, batch), self.grad(w, batch)


def make_flat_objective(
    loss_minibatch_flat: Given[LossFn], grad_loss_minibatch: Given[LossFn | None] = None
) -> CallableObjective:
    """Build a `FlatObjective` from a flat loss and, optionally, its own gradient.

    Args:
        loss_minibatch_flat: `(w, batch) -> mean loss per example` with `w` of shape (dim,); or one
            loss for each example, or (losses, weights), as `estimate_llc` takes them.
        grad_loss_minibatch: `(w, batch) -> gradient` of shape (dim,); autodiff when left out.

    Returns:
        The objective; its `value_and_grad` uses `grad_loss_minibatch` when given.

    Raises:
        DataError: If an argument cannot be called.
    """
    for name, value in (
        ("loss_minibatch_flat", loss_minibatch_flat),
        ("grad_loss_minibatch", grad_loss_minibatch),
    ):
        if not callable(value) and not (value is None and name == "grad_loss_minibatch"):
            raise DataError(
                f"{name} must be a function (w, batch) -> array; got {type(value).__name__}."
            )
    return CallableObjective(loss_minibatch_flat, grad_loss_minibatch)


def call_full_loss(loss_full_flat: Given[LossFn], w: Float[Array, " dim"], data: Batch) -> Scalar:
    """Evaluate a full-data loss of either form, `(w) -> L_n(w)` or `(w, data) -> L_n(w)`.

    Raises:
        DataError: If it can be called in neither way.
    """
    takes_one, takes_two = (_takes(loss_full_flat, count) for count in (1, 2))
    if takes_one is None and takes_two is None:  # *args, or no signature: the arguments tell
        try:
            jax.eval_shape(loss_full_flat, w)
        except (TypeError, ValueError, IndexError):  # too few of them
            takes_one = False
    if takes_one is False and takes_two is False:
        raise DataError(
            "loss_full_flat must be a function (w) -> loss or (w, data) -> loss; it takes neither."
        )
    arguments = (w, raw_examples(data)) if takes_one is False else (w,)
    return call_in_their_modes(loss_full_flat, *arguments)


def _takes(function: Given[LossFn], count: int) -> bool | None:
    """Say whether a function takes so many arguments, None where it takes any number."""
    try:
        signature = inspect.signature(function)
        signature.bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return None
    anything = any(
        p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values()
    )
    return None if anything else True
