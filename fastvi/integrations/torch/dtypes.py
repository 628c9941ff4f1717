"""In which precision data, modules and losses are."""

import torch


def cast_full(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of single or double precision in this one."""
    is_full = tensor.is_floating_point() and tensor.dtype.itemsize >= 4
    return tensor.to(dtype) if is_full else tensor
