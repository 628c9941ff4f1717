"""What a module, and what a loss of it returns, are held to before anything is estimated."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastvi._errors import DataError

DROPOUTS = (
    torch.nn.Dropout,
    torch.nn.Dropout1d,
    torch.nn.Dropout2d,
    torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)
BATCH_NORMS = (
    torch.nn.BatchNorm1d,
    torch.nn.BatchNorm2d,
    torch.nn.BatchNorm3d,
    torch.nn.SyncBatchNorm,
)
INSTANCE_NORMS = (
    torch.nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d,
    torch.nn.InstanceNorm3d,
)
WITH_DROPOUT = (torch.nn.RNNBase, torch.nn.MultiheadAttention)


class Form(NamedTuple):
    """What a loss returns.

    Attributes:
        dtype: Name of the dtype of the losses.
        of_example: Shape of the losses of one example; None where the mean of the batch is
            returned.
        is_weighted: Whether weights come with the losses.
    """

    dtype: str
    of_example: tuple[int, ...] | None
    is_weighted: bool


def check_mode(module: torch.nn.Module) -> None:
    """Refuse layers that, in their mode, draw random numbers or read the batch as a whole.

    Raises:
        DataError: If there is one; it is named.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, BATCH_NORMS) and layer.running_mean is None:
            raise DataError(
                f"the layer {name!r}, {type(layer).__name__}, keeps no running statistics "
                "(track_running_stats=False), so that the loss of an example depends on which "
                "others share its batch, after model.eval() too. Give it statistics: train with "
                "track_running_stats=True, or normalise within examples (GroupNorm, LayerNorm)."
            )
        if layer.training and _depends_on_mode(layer):
            raise DataError(
                f"the layer {name!r}, {type(layer).__name__}, is in training mode, in which the "
                "loss is random or depends on which examples share a batch. Call model.eval()."
            )


def _depends_on_mode(layer: torch.nn.Module) -> bool:
    if isinstance(layer, DROPOUTS):
        return layer.p > 0
    if isinstance(layer, WITH_DROPOUT):
        return float(layer.dropout) > 0
    if isinstance(layer, INSTANCE_NORMS):
        # without running statistics it is the same in both modes
        return layer.track_running_stats
    return isinstance(layer, (*BATCH_NORMS, torch.nn.RReLU))


def check_module(module: Any) -> None:
    """Refuse what is no module, or one whose parameters cannot vary.

    Raises:
        DataError: With what to do.
    """
    if not isinstance(module, torch.nn.Module):
        raise DataError(f"module must be a torch.nn.Module; got {type(module).__name__}.")
    check_mode(module)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise DataError(
                f"parameter {name!r} has dtype {parameter.dtype}; only real floating-point "
                "parameters can be varied. Make it a buffer (register_buffer) if it is to stay "
                "as it is; write a complex one as two real ones."
            )
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise DataError(
            f"no parameter of the module requires a gradient, of {len(parameters)}, so there is "
            "nothing to vary. Call model.requires_grad_(True)."
        )
    _check_devices(module)


def _check_devices(module: torch.nn.Module) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1 or devices == ["meta"]:
        raise DataError(
            f"parameters and buffers must be on one device, with values; they are on "
            f"{', '.join(devices)}. Call model.to(device)."
        )


def read_form(
    outputs: Any,
    sizes: tuple[int, int],
    device: torch.device,
    parameters: Sequence[torch.nn.Parameter],
) -> Form:
    """Say what a loss of these parameters returned on two batches of these sizes.

    Raises:
        DataError: If it is none of the forms that a loss may have.
    """
    pairs: list[tuple[Any, ...]] = [
        tuple(one) if isinstance(one, (tuple, list)) else (one,) for one in outputs
    ]
    for pair in pairs:
        _check_tensors(pair, device)
    losses = [pair[0] for pair in pairs]
    if not _depends_on(losses[0], parameters):
        raise DataError(
            "the loss has no gradient by the parameters of the module: it was computed under "
            "torch.no_grad() or inference_mode(), detached, or of another module. Compute it by "
            "torch alone of the module's outputs, or in batch_loss of the module that it is given."
        )
    is_weighted = len(pairs[0]) == 2
    shapes = [tuple(one.shape) for one in losses]
    dtype = str(losses[0].dtype).removeprefix("torch.")
    if not is_weighted and shapes == [(), ()]:
        return Form(dtype, None, False)
    of_example = shapes[0][1:]
    if shapes != [(size, *of_example) for size in sizes]:
        raise _refusal(f"{shapes[0]} for {sizes[0]} examples and {shapes[1]} for {sizes[1]}")
    if is_weighted and [tuple(pair[1].shape) for pair in pairs] != shapes:
        raise _refusal(f"losses of shape {shapes[0]} with weights of {tuple(pairs[0][1].shape)}")
    return Form(dtype, of_example, is_weighted)


def _depends_on(losses: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> bool:
    if not losses.requires_grad:
        return False
    slopes = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    return any(slope is not None for slope in slopes)


def _check_tensors(pair: Any, device: torch.device) -> None:
    if not 1 <= len(pair) <= 2 or not all(isinstance(one, torch.Tensor) for one in pair):
        raise _refusal(", ".join(type(one).__name__ for one in pair) or "nothing")
    if not pair[0].is_floating_point():
        raise _refusal(f"dtype {pair[0].dtype}")
    for one in pair:
        if one.device.type != device.type or (device.index is not None and one.device != device):
            raise DataError(
                f"the loss is on the device {one.device}, and the module on {device}. Compute the "
                "loss where the outputs of the module are."
            )


def _refusal(came: str) -> DataError:
    return DataError(
        "the loss must return tensors: the mean of the batch as a scalar, one loss for each "
        "example or each of its tokens, batch axis first, or (losses, weights) of one such shape; "
        f"got {came}. Keep tensors (no .item()), and reshape losses of tokens to (batch, tokens)."
    )
