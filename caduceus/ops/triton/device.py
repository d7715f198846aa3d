"""What the launchers ask of the device that a tensor is on."""

import contextlib

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4
CHANNELS = 32 * WARPS
"""Channels of a program whose threads take one channel each, and so meet what they stored themselves."""
LAUNCH = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}
"""Options of every launch. One stage: a loop that adds to what is in memory must not have its loads moved ahead of the
stores of the turn before. Products and sums fuse, whatever Triton's default is.
"""
SIZES = (
    *("S", "batch", "L", "n_chunks", "chunk_size", "reverse", "descending", "item0", "blocks"),
    *("rows", "stream_rows", "tokens", "sequence_tiles", "tiles", "V", "ignore", "heads"),
)
"""Arguments whose value no kernel is compiled for: little in an inner loop depends on it."""


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 where Triton's interpreter runs on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tokens_per_program(runs: int, length: int, channels: int, device: torch.device) -> int:
    """Tokens that a program takes of each of `runs` sequences: many, so that few states and partial sums are kept, but
    not so many that the chunks of a small batch leave the GPU empty, which has room for about four at a time each."""
    programs = runs * triton.cdiv(channels, CHANNELS)
    enough = 4 * multiprocessors(device)
    for chunk in (256, 128, 64):
        if programs * triton.cdiv(length, chunk) >= enough:
            return chunk
    return 32


def channel_block(x: Tensor) -> int:
    """Channels of a program with one channel per thread; the interpreter's are no larger than x."""
    assert CHANNELS % (32 * LAUNCH["num_warps"]) == 0, (
        "a channel of two threads, of which one reads what the other stores"
    )
    return CHANNELS if x.is_cuda else max(16, triton.next_power_of_2(min(x.shape[-1], CHANNELS)))


def wide_channel_block(x: Tensor) -> int:
    """Channels of a program with two channels per thread, which then loads once what both need.

    It has one channel per thread where the second would be missing too often. For kernels that read back nothing that
    they stored, or that wait in between.
    """
    block = channel_block(x)
    return 2 * block if triton.cdiv(x.shape[-1], block) % 2 == 0 else block


def require_float(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: the triton backend takes float32, bfloat16 or float16, got {tensor.dtype}")


def as_rows(tensor: Tensor) -> Tensor:
    """(…, L, C) as (rows, L, C) with adjacent channels; a view wherever the strides allow it.

    A token's stride is kept under 2^20, so that steps within a tile or chunk fit in int32.
    """
    tensor = tensor.flatten(0, -3)
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) < 2**20 else tensor.contiguous()
