"""A transformed haiku function as `fastvi.estimate_llc` takes it."""

import inspect
from typing import Any

from fastvi._errors import DataError
from fastvi._optional import import_optional
from fastvi._typing import PyTree
from fastvi.integrations.outputs import OutputLoss, ParamsLoss, loss_of_params


def haiku_loss(
    transformed: Any, loss: OutputLoss, *, state: PyTree = None, rng: Any = None
) -> ParamsLoss:
    """Make a loss of the parameters that `init` returned.

    Args:
        transformed: What `hk.transform` or `hk.transform_with_state` returned, also within
            `hk.without_apply_rng`.
        loss: `(outputs, targets)` to the mean loss, to one loss for each example, or to (losses,
            weights), in nats.
        state: The state of a function transformed with state; it is read and not updated.
        rng: Key of a function that draws; the same at every call, so that the loss is a function of
            the parameters.

    Returns:
        The loss of `(params, (inputs, targets))`.

    Raises:
        DataError: If the function takes no state or key and is given one, or is none.
        MissingExtraError: If haiku is not installed.
    """
    haiku = import_optional("haiku", extra="haiku", distribution="dm-haiku", purpose="haiku_loss")
    with_state = isinstance(transformed, haiku.TransformedWithState)
    if not callable(getattr(transformed, "apply", None)):
        raise DataError(
            "transformed must be what hk.transform or hk.transform_with_state returned; got "
            f"{type(transformed).__name__}. Of a multi_transform pass hk.Transformed(init, one of "
            "its applies)."
        )
    apply = transformed.apply
    # haiku's order is params, state, key, inputs; what a function has no use for is left out.
    before = (state,) if with_state else ()
    # All take a key in the next place but those of `hk.without_apply_rng`.
    names = list(inspect.signature(apply).parameters)
    if names[1 + len(before) :][:1] == ["rng"]:
        before = (*before, rng)
    elif rng is not None:
        raise DataError(
            "rng is given, and the function takes none: leave it out, or leave out "
            "hk.without_apply_rng."
        )
    if state is not None and not with_state:
        raise DataError(
            "state is given, and the function has none: use hk.transform_with_state, or leave it "
            "out."
        )

    def outputs_of(params: PyTree, inputs: Any) -> Any:
        outputs = apply(params, *before, inputs)
        return outputs[0] if with_state else outputs

    return loss_of_params(outputs_of, loss)
