"""The precision that products are computed in."""

from contextlib import nullcontext

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext:
    """bf16 autocast for `bf16`; nothing for `fp32` and `fp64`, which the parameters have themselves."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
