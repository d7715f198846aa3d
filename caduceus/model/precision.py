"""The precision of matrix products."""

from contextlib import nullcontext

import torch
from torch import Tensor


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext:
    """A context: bf16 autocast for `bf16`; none for `fp32` and `fp64`, which are the types of the parameters."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The type of products with a tensor: autocast's on its device, or the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
