"""The precision that products are computed in."""

from contextlib import nullcontext

import torch
from torch import Tensor


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext:
    """bf16 autocast for `bf16`; nothing for `fp32` and `fp64`, which the parameters have themselves."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The type that products with a tensor on this device are computed in: autocast's, or the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
