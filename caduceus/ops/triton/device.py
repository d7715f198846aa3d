"""What the launchers ask of the device that a tensor is on."""

import contextlib
from functools import cache

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4
LAUNCH = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}
"""Options of every launch. One stage: loops that add to what is in memory must not have their loads moved ahead of the
stores of the turn before, and the kernels hide latency by other means. Products and sums fuse whatever Triton's default.
"""
SIZES = (
    *("P", "S", "batch", "L", "n_chunks", "chunk_size", "reverse", "descending", "item0", "blocks"),
    *("rows", "stream_rows", "tokens", "V", "ignore"),
)
"""Arguments whose value no kernel is compiled for: nothing in an inner loop depends on it."""
SIZES_AND_STRIDES = (*SIZES, "E", *(f"{t}_{of}" for t in ("u", "dt", "B", "C", "z") for of in ("row", "token")))
"""For kernels of one channel per thread, which gain nothing from a divisor of a stride."""


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
