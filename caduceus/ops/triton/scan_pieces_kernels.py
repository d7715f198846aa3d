"""Kernels that lay B and C out for scan_backward (scan_backward_kernels.py), and bring their gradients back.

A piece is T tokens of a chunk in the order in which the scan takes them.
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES


@triton.jit
def _piece(local, piece, item0, P, S, batch, L, n_chunks, chunk_size, reverse, T: tl.constexpr):
    """(row, positions of a piece's T tokens, which of them there are) for an item of scan_backward."""
    n_items = tl.num_programs(0) // P
    d = local // n_items
    item = item0 + local % n_items
    chunk, sb = item % n_chunks, item // n_chunks
    b, s = sb % batch, sb // batch
    rev = (d + s + reverse) % 2
    begin = chunk * chunk_size
    length = tl.minimum(L - begin, chunk_size)
    k = piece * T + tl.arange(0, T)
    t = begin + tl.where(rev == 1, length - 1 - k, k)
    return d * S * batch + s * batch + b, t, k < length


@triton.jit(do_not_specialize=("P", *SIZES))
def gather_pieces_kernel(
    B_ptr,
    C_ptr,
    pieces_ptr,
    item0,
    P,
    S,
    batch,
    L,
    n_chunks,
    chunk_size,
    reverse,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
):
    """pieces (P, items, chunk_size / T, N, 2 T): B, then C of T tokens in the order in which they are taken.

    So scan_backward finds what it needs for a state in one place. Zero for what lies past the end of a chunk.
    """
    local = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    row, t, valid = _piece(local, piece, item0, P, S, batch, L, n_chunks, chunk_size, reverse, T)
    n = tl.arange(0, BLOCK)
    use = valid[None, :] & (n < N)[:, None]
    at = (row * L + t)[None, :] * N + n[:, None]
    B = tl.load(B_ptr + at, mask=use, other=0.0)
    C = tl.load(C_ptr + at, mask=use, other=0.0)
    at = pieces_ptr + ((local * (chunk_size // T) + piece) * N + n[:, None]) * 2 * T + tl.arange(0, T)[None, :]
    tl.store(at, B, mask=tl.broadcast_to((n < N)[:, None], [BLOCK, T]))
    tl.store(at + T, C, mask=tl.broadcast_to((n < N)[:, None], [BLOCK, T]))


@triton.jit(do_not_specialize=("P", *SIZES))
def scatter_pieces_kernel(
    dpieces_ptr,
    dB_ptr,
    dC_ptr,
    blocks,
    item0,
    P,
    S,
    batch,
    L,
    n_chunks,
    chunk_size,
    reverse,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    T: tl.constexpr,
):
    """dB and dC (rows, L, N), the sums of `dpieces` (blocks, P, items, chunk_size / T, N, 2 T) over channel blocks."""
    local = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    row, t, valid = _piece(local, piece, item0, P, S, batch, L, n_chunks, chunk_size, reverse, T)
    n = tl.arange(0, BLOCK)
    use = valid[None, :] & (n < N)[:, None]
    pieces = chunk_size // T
    at = dpieces_ptr + ((local * pieces + piece) * N + n[:, None]) * 2 * T + tl.arange(0, T)[None, :]
    dB = tl.zeros([BLOCK, T], tl.float32)
    dC = tl.zeros([BLOCK, T], tl.float32)
    for _ in range(blocks):
        dB += tl.load(at, mask=use, other=0.0)
        dC += tl.load(at + T, mask=use, other=0.0)
        at += tl.num_programs(0).to(tl.int64) * pieces * N * 2 * T
    out = (row * L + t)[None, :] * N + n[:, None]
    tl.store(dB_ptr + out, dB.to(dB_ptr.dtype.element_ty), mask=use)
    tl.store(dC_ptr + out, dC.to(dC_ptr.dtype.element_ty), mask=use)
