"""Facts about a tensor's device for the launchers of kernels."""

import contextlib

import torch
import triton
from torch import Tensor

from caduceus.devices import is_gpu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4
CHANNELS = 32 * WARPS
"""Channels of a program whose threads have one channel each, and so read only what they stored themselves."""
LAUNCH = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": True}
"""Options of every launch. One stage: in a loop that adds to values in memory, loads must not be moved ahead of the
stores of the turn before. Products and sums are fused, whatever Triton's default is.
"""
CHUNKS = range(32, 513, 8)
"""Tokens that a program may take: more of them keep fewer states and partial sums, fewer fill a GPU by less."""
CHUNK_COSTS = 16
"""Tokens in whose time a program loads and stores what is of its chunk."""
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
    return torch.cuda.get_device_properties(device).multi_processor_count if is_gpu(device) else 1


def places(resident: int, device: torch.device) -> int:
    """Programs that run on a GPU at a time, `resident` on each multiprocessor."""
    return resident * multiprocessors(device)


def tokens_per_program(runs: int, length: int, programs: int, resident: int, device: torch.device) -> int:
    """Tokens that each of a chunk's `programs` takes of each of `runs` sequences.

    A GPU that has `resident` programs on each multiprocessor takes the programs of a launch in waves. The chunks are
    such that these take the fewest tokens one after another, with `CHUNK_COSTS` for what a chunk begins with.
    """
    at_a_time = places(resident, device)
    best, least = CHUNKS[0], 0
    for chunk in CHUNKS:  # not by min, which torch.compile does not see through
        waves = triton.cdiv(runs * programs * triton.cdiv(length, chunk), at_a_time)
        tokens_in_turn = waves * (chunk + CHUNK_COSTS)
        if chunk == CHUNKS[0] or tokens_in_turn <= least:
            best, least = chunk, tokens_in_turn
    return best


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


def in_pairs(tensor: Tensor) -> Tensor:
    """Contiguous fp32 at an address that is a multiple of 8, as a GPU cannot load two numbers from other addresses."""
    tensor = tensor.contiguous()
    return tensor if tensor.storage_offset() % 2 == 0 else tensor.clone()
