"""A transformed haiku function as `fastvi.estimate_llc` takes it."""

import inspect
from typing import Any

import jax

from fastvi._errors import DataError
from fastvi._optional import import_optional
from fastvi._typing import PyTree
from fastvi.integrations.modes import training_mode
from fastvi.integrations.names import few
from fastvi.integrations.outputs import OutputLoss, ParamsLoss, loss_of_params

EVALUATE = "Pass is_training=False, or what your function calls it, as in haiku_loss(..., {})."


def haiku_loss(
    transformed: Any,
    loss: OutputLoss,
    *,
    state: PyTree = None,
    rng: Any = None,
    **apply_options: Any,
) -> ParamsLoss:
    """Make a loss of the parameters that `init` returned.

    Args:
        transformed: What `hk.transform` or `hk.transform_with_state` returned, also within
            `hk.without_apply_rng`.
        loss: `(outputs, targets)` to the mean loss, to one loss for each example, or to (losses,
            weights), in nats.
        state: The state of a function transformed with state; it is read and not updated.
        rng: Key of a function that draws; the same at every call, so that the loss is a function of
            the parameters. What it draws must not depend on the place of an example in its batch.
        **apply_options: Passed to the function after its inputs, such as `is_training=False`.

    Returns:
        The loss of `(params, (inputs, targets))`. It raises `DataError` where the function draws
        without a key, or changes its state.

    Raises:
        DataError: If the function takes no state or key and is given one, needs a state and is
            given none, or is none.
        MissingExtraError: If haiku is not installed.
    """
    haiku = import_optional("haiku", extra="haiku", distribution="dm-haiku", purpose="haiku_loss")
    with_state = isinstance(transformed, haiku.TransformedWithState)
    apply = _apply_of(transformed, with_state, state)
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

    def outputs_of(params: PyTree, inputs: Any) -> Any:
        outputs = _call(apply, (params, *before, inputs), apply_options)
        if not with_state:
            return outputs
        _refuse_changes(state, outputs[1])
        return outputs[0]

    return loss_of_params(outputs_of, loss)


def _apply_of(transformed: Any, with_state: bool, state: PyTree) -> Any:
    """Return the function, or say why it cannot be called."""
    apply = getattr(transformed, "apply", None)
    if not callable(apply):
        raise DataError(
            "transformed must be what hk.transform or hk.transform_with_state returned; got "
            f"{type(transformed).__name__}. Of a multi_transform pass hk.Transformed(init, one of "
            "its applies)."
        )
    if state is not None and not with_state:
        raise DataError(
            "state is given, and the function has none: use hk.transform_with_state, or leave it "
            "out."
        )
    if state is None and with_state:
        raise DataError(
            "the function is transformed with state, and none is given. Pass it, as in "
            "haiku_loss(..., state=state), from params, state = transformed.init(...) after "
            "training."
        )
    return apply


def _call(apply: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    try:
        return apply(*arguments, **options)
    except ValueError as error:
        # haiku does not export the class.
        if type(error).__name__ != "MissingRNGError":
            raise
        raise training_mode(
            "it asks for a random key, as hk.dropout does", EVALUATE.format("is_training=False")
        ) from error


def _refuse_changes(before: PyTree, after: PyTree) -> None:
    """Refuse a function that sets its state: an array that nobody sets is the same object after."""
    old = {jax.tree_util.keystr(path): leaf for path, leaf in _flat(before)}
    changed = [
        name
        for path, leaf in _flat(after)
        if leaf is not old.get(name := jax.tree_util.keystr(path))
    ]
    if changed:
        raise training_mode(
            f"it sets its state {few(changed)}, as hk.BatchNorm does",
            EVALUATE.format("is_training=False"),
        )


def _flat(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
