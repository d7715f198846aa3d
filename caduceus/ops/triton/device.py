"""What the launchers ask of the device that a tensor is on."""

import contextlib
from functools import cache

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 where Triton's interpreter runs on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def require_float(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: the triton backend takes float32, bfloat16 or float16, got {tensor.dtype}")


def as_rows(tensor: Tensor) -> Tensor:
    """(…, L, C) as (rows, L, C) with adjacent channels; a view wherever the strides allow it.

    A token's stride is kept under 2^20, so that steps within a tile or chunk fit in int32.
    """
    tensor = tensor.flatten(0, -3)
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) < 2**20 else tensor.contiguous()
