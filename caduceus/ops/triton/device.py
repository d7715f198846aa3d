"""Facts about a tensor's device for the launchers of kernels."""

import contextlib

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4
CHANNELS = 32 * WARPS
"""Channels of a program whose threads have one channel each, and so read only what they stored themselves."""
LAUNCH = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}
"""Options of every launch. One stage: in a loop that adds to values in memory, loads must not be moved ahead of the
stores of the turn before. Products and sums are fused, whatever Triton's default is.
"""
SIZES = (
    *("S", "batch", "L", "n_chunks", "chunk_size", "reverse", "descending", "item0", "blocks"),
    *("rows", "stream_rows", "tokens", "sequence_tiles", "tiles", "V", "ignore", "heads"),
)
"""Arguments for whose values kernels are not specialised, as little in the inner loops depends on them."""


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context that makes the tensor's GPU the current one, where Triton launches kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 where Triton's interpreter runs on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tokens_per_program(runs: int, length: int, channels: int, device: torch.device) -> int:
    """Tokens that a program takes of each of `runs` sequences: many, so that few states and partial sums are kept, but
    not so many that the chunks of a small batch leave multiprocessors idle, each of which can run about four at a time.
    """
    programs = runs * triton.cdiv(channels, CHANNELS)
    enough = 4 * multiprocessors(device)
    for chunk in (256, 128, 64):
        if programs * triton.cdiv(length, chunk) >= enough:
            return chunk
    return 32


def channel_block(x: Tensor) -> int:
    """Channels of a program with one channel per thread; the interpreter's are no larger than x."""
    assert CHANNELS % (32 * LAUNCH["num_warps"]) == 0, (
        "with more channels than threads one thread would read what another stores"
    )
    return CHANNELS if x.is_cuda else max(16, triton.next_power_of_2(min(x.shape[-1], CHANNELS)))


def wide_channel_block(x: Tensor) -> int:
    """Channels of a program with two channels per thread, which then loads shared operands once.

    It is one channel per thread where the second would often be missing. It is for kernels that do not read back what
    they stored, or that synchronise in between.
    """
    block = channel_block(x)
    return 2 * block if triton.cdiv(x.shape[-1], block) % 2 == 0 else block


def require_float(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: the triton backend takes float32, bfloat16 or float16, got {tensor.dtype}")


def as_rows(tensor: Tensor) -> Tensor:
    """(…, L, C) as (rows, L, C) with adjacent channels; a view wherever the strides allow it.

    A token's stride is kept below 2^20, so that offsets within a tile or chunk fit in int32.
    """
    tensor = tensor.flatten(0, -3)
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) < 2**20 else tensor.contiguous()
