"""A flax linen module as `fastvi.estimate_llc` takes it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastvi._errors import ConfigError, DataError
from fastvi._optional import import_optional
from fastvi._typing import PyTree
from fastvi.integrations.modes import evaluation_option, training_mode
from fastvi.integrations.outputs import OutputLoss, ParamsLoss, loss_of_params

# Collections that layers of flax make beside the parameters. A mapping without "params" that has
# one of these is no bare "params".
COLLECTIONS = {"batch_stats", "cache", "intermediates", "losses", "fp8_params", "spectral_stats"}
STATE_FIELDS = {"step", "apply_fn", "params", "tx", "opt_state"}


def linen_loss(
    module: Any, variables: Any, loss: OutputLoss, **apply_options: Any
) -> tuple[ParamsLoss, PyTree]:
    """Make a loss of a module's "params"; its other collections stay as they are.

    Args:
        module: A `flax.linen.Module`.
        variables: What `init` returned, trained, a dict or FrozenDict of collections; or the
            collection "params" alone; or a `flax.training.train_state.TrainState`, whose mappings
            beside `params`, such as `batch_stats`, are its other collections.
        loss: `(outputs, targets)` to the mean loss, to one loss for each example, or to (losses,
            weights), in nats.
        **apply_options: Passed to `apply`, such as `train=False` or `method="encode"`.

    Returns:
        The loss of `(params, (inputs, targets))`, and the parameters. The loss raises `DataError`
        where the module draws random numbers, updates its collections, or does not fit the
        variables.

    Raises:
        ConfigError: If the options let the module draw or update its collections.
        DataError: If this is no module, or the variables hold no "params".
        MissingExtraError: If flax is not installed.
    """
    linen = import_optional("flax.linen", extra="flax", distribution="flax", purpose="linen_loss")
    # An nnx module has no `apply`, and would fail within the estimate.
    if not isinstance(module, linen.Module):
        raise DataError(
            f"module must be a flax.linen.Module; got {type(module).__name__}. For nnx use "
            "nnx_loss, for a TrainState alone train_state_loss."
        )
    params, fixed = _split(variables)
    return _loss_of(module.apply, module, params, fixed, loss, apply_options)


def train_state_loss(
    state: Any, loss: OutputLoss, **apply_options: Any
) -> tuple[ParamsLoss, PyTree]:
    """Make a loss of the parameters of a flax train state, by its own `apply_fn`.

    Args:
        state: A `flax.training.train_state.TrainState` or a subclass. Its mappings beside `params`,
            such as `batch_stats`, are passed to `apply_fn` as collections and stay as they are.
        loss: As for `linen_loss`.
        **apply_options: Passed to `apply_fn`, such as `train=False`.

    Returns:
        As `linen_loss`.

    Raises:
        ConfigError: If the options let the module draw or update its collections.
        DataError: If this is no train state.
        MissingExtraError: If flax is not installed.
    """
    import_optional("flax", extra="flax", distribution="flax", purpose="train_state_loss")
    if not _is_train_state(state):
        raise DataError(
            "state must be a TrainState with apply_fn, params and opt_state; got "
            f"{type(state).__name__}. For a module and its variables use linen_loss."
        )
    params, fixed = _split(state)
    module = getattr(state.apply_fn, "__self__", None)
    return _loss_of(state.apply_fn, module, params, fixed, loss, apply_options)


def _loss_of(
    apply_fn: Callable[..., Any],
    module: Any,
    params: PyTree,
    fixed: Mapping[str, Any],
    loss: OutputLoss,
    options: Mapping[str, Any],
) -> tuple[ParamsLoss, PyTree]:
    _check_options(options, fixed)
    option = evaluation_option(module)
    change = (
        f"Pass {option or 'the option of your module for evaluation'}, as in linen_loss(..., "
        f"{option or 'train=False'})."
    )

    def apply(params: PyTree, inputs: Any) -> Any:
        with _explained(fixed, change):
            return apply_fn({"params": params, **fixed}, inputs, **options)

    return loss_of_params(apply, loss), params


def _split(variables: Any) -> tuple[PyTree, dict[str, Any]]:
    """Return the parameters, and the collections beside them."""
    if _is_train_state(variables):
        fields = set(getattr(variables, "__dataclass_fields__", ())) - STATE_FIELDS
        values = {name: getattr(variables, name) for name in fields}
        fixed = {name: value for name, value in values.items() if isinstance(value, Mapping)}
        # Some keep what `init` returned, with its collections, as the state's params.
        params, inner = _split(variables.params)
        return params, {**inner, **fixed}
    if not isinstance(variables, Mapping):
        raise DataError(
            "variables must be what init returned, or a TrainState; got "
            f"{type(variables).__name__}."
        )
    if "params" in variables:
        fixed = {name: variables[name] for name in variables if name != "params"}
        return variables["params"], fixed
    if not variables or COLLECTIONS & set(variables):
        raise DataError(f'variables must hold the collection "params"; got {sorted(variables)}.')
    return variables, {}


def _is_train_state(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("apply_fn", "params", "opt_state"))


def _check_options(options: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    if options.get("rngs") is not None:
        raise ConfigError(
            "rngs are of a module that draws, as dropout does in training; the loss must not. "
            "Leave rngs out, and pass deterministic=True or train=False."
        )
    flax_scope = import_optional(
        "flax.core.scope", extra="flax", distribution="flax", purpose="linen_loss"
    )
    mutable = options.get("mutable", False)
    changed = [name for name in fixed if flax_scope.in_filter(mutable, name)]
    if changed or mutable is True:
        raise ConfigError(
            f"mutable={mutable!r} lets the module update {', '.join(changed) or 'its variables'}, "
            "as batch normalisation does in training. Leave mutable out, and pass train=False or "
            "use_running_average=True."
        )


@contextlib.contextmanager
def _explained(fixed: Mapping[str, Any], change: str) -> Iterator[None]:
    """Say of flax's errors what to change."""
    errors = import_optional("flax.errors", extra="flax", distribution="flax", purpose="linen_loss")
    try:
        yield
    except errors.InvalidRngError as error:
        raise training_mode(f"it draws random numbers ({_first(error)})", change) from error
    except errors.ModifyScopeVariableError as error:
        raise training_mode(f"it updates its statistics ({_first(error)})", change) from error
    except errors.ScopeCollectionNotFound as error:
        raise DataError(
            f"{_first(error)}. Pass all that init returned and training updated, such as "
            f'{{"params": ..., "batch_stats": ...}}; beside "params" there are {sorted(fixed)}.'
        ) from error
    except (errors.ScopeParamNotFoundError, errors.ScopeParamShapeError) as error:
        raise DataError(
            f"the parameters do not fit the module: {_first(error)}. Pass those that its init made."
        ) from error


def _first(error: Exception) -> str:
    """Return flax's words without its link."""
    return str(error).partition(" (https:")[0].rstrip(".")
