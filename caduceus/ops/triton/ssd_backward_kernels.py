"""Kernels of the gradients of Mamba-2's scan, given the state that enters each chunk and the adjoint that leaves it.

Shapes as in ssd_kernels.py. B and C belong to all heads: a program adds up their gradients over its own, in registers,
of which there are not enough for those of x, dt and the parameters too. So there are two kernels.
"""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES
from caduceus.ops.triton.ssd_kernels import (
    ssd_decays,
    ssd_edges,
    ssd_last,
    ssd_load_state,
    ssd_place,
    ssd_steps,
    ssd_store,
    ssd_tile,
)


@triton.jit(do_not_specialize=SIZES)
def ssd_input_gradient_kernel(
    dy_ptr,
    x_ptr,
    B_ptr,
    C_ptr,
    dt_ptr,
    A_ptr,
    D_ptr,
    bias_ptr,
    starts_ptr,
    entering_ptr,
    adjoint_ptr,
    dx_ptr,
    ddt_ptr,
    dA_ptr,
    dD_ptr,
    dbias_ptr,
    x_row,
    x_stride,
    k_row,
    k_stride,
    S,
    batch,
    L,
    n_chunks,
    reverse,
    H,
    W: tl.constexpr,
    N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx (rows, L, H, W) and ddt (rows, L, H); dA, dD and dbias (rows, chunks, H)."""
    item = tl.program_id(0).to(tl.int64)
    row, d, position, inside, passed = ssd_place(item, starts_ptr, S, batch, L, n_chunks, reverse, T, HAS_STARTS)
    h = tl.program_id(1)
    rate, bias = tl.load(A_ptr + d * H + h), tl.load(bias_ptr + d * H + h)
    at = (row * L + position) * H + h
    step, slope, logs = ssd_steps(dt_ptr, rate, bias, at, inside)
    from_before, to_end, decay = ssd_edges(logs, passed, T)
    x = ssd_tile(x_ptr + h * W, row, position, inside, x_row, x_stride, W, BLOCK_W)
    dy = ssd_tile(dy_ptr + h * W, row, position, inside, tl.cast(L, tl.int64) * (H * W), H * W, W, BLOCK_W)
    B = ssd_tile(B_ptr, row, position, inside, k_row, k_stride, N, BLOCK_N)
    C = ssd_tile(C_ptr, row, position, inside, k_row, k_stride, N, BLOCK_N)
    entering = ssd_load_state(entering_ptr, item * H + h, W, N, BLOCK_W, BLOCK_N)
    adjoint = ssd_load_state(adjoint_ptr, item * H + h, W, N, BLOCK_W, BLOCK_N)
    # What goes from the state that enters to the outputs, and from x to the state that leaves.
    carried = tl.dot(C, tl.trans(entering), input_precision="tf32x3") * from_before[:, None]
    dlog = tl.sum(carried * dy.to(tl.float32), 1)
    dfed = tl.dot(B, tl.trans(adjoint), input_precision="tf32x3") * to_end[:, None]
    leaving = tl.sum(dfed * x.to(tl.float32), 1) * step
    through = tl.sum(tl.sum(entering.to(tl.float32) * adjoint.to(tl.float32), 1), 0) * decay
    dlog += tl.where(tl.arange(0, T) == T - 1, tl.sum(leaving, 0) + through, 0.0) - leaving

    # What goes from position to position.
    weights = tl.dot(C, tl.trans(B), input_precision="tf32x3")
    weights *= ssd_decays(weights, logs, passed, T, HAS_STARTS, x.dtype == tl.float32)
    dfed = tl.dot(tl.trans(weights.to(x.dtype)), dy, dfed, input_precision="tf32x3")
    dlogs = tl.dot(dy, tl.trans(x), input_precision="tf32x3") * (weights * step[None, :])
    if x.dtype == tl.float32:  # most of these sums cancel
        dlogs = dlogs.to(tl.float64)
    dlog = dlog + tl.sum(dlogs, 1) - tl.sum(dlogs, 0)

    dx = dfed * step[:, None] + tl.load(D_ptr + d * H + h) * dy.to(tl.float32)
    ssd_store(dx_ptr + h * W, dx, row, position, inside, tl.cast(L, tl.int64) * (H * W), H * W, W, BLOCK_W)
    # A step decays whatever passes it: the logarithms of its own position and of all after it.
    sums = tl.cumsum(dlog.to(tl.float64), 0)
    decayed = (ssd_last(sums, T) - sums + dlog.to(tl.float64)).to(tl.float32)
    ddt = (decayed * rate + tl.sum(dfed * x.to(tl.float32), 1)) * slope
    tl.store(ddt_ptr + at, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
    tl.store(dA_ptr + item * H + h, tl.sum(decayed * step, 0))
    tl.store(dD_ptr + item * H + h, tl.sum(tl.sum(dy.to(tl.float32) * x.to(tl.float32), 1), 0))
    tl.store(dbias_ptr + item * H + h, tl.sum(tl.where(inside, ddt, 0.0), 0))


@triton.jit(do_not_specialize=SIZES)
def ssd_state_gradient_kernel(
    dy_ptr,
    x_ptr,
    B_ptr,
    C_ptr,
    dt_ptr,
    A_ptr,
    bias_ptr,
    starts_ptr,
    entering_ptr,
    adjoint_ptr,
    dB_ptr,
    dC_ptr,
    x_row,
    x_stride,
    k_row,
    k_stride,
    S,
    batch,
    L,
    n_chunks,
    reverse,
    H,
    heads,
    W: tl.constexpr,
    N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dB and dC (groups of heads, rows, L, N), each summed over the heads of a group."""
    item = tl.program_id(0).to(tl.int64)
    row, d, position, inside, passed = ssd_place(item, starts_ptr, S, batch, L, n_chunks, reverse, T, HAS_STARTS)
    dB = tl.zeros([T, BLOCK_N], tl.float32)
    dC = tl.zeros([T, BLOCK_N], tl.float32)
    first = tl.program_id(1) * heads
    # What is hoisted out of the loop, addresses in shared memory above all, would not fit in the registers.
    for h in tl.range(first, tl.minimum(first + heads, H), disable_licm=HAS_STARTS):
        rate, bias = tl.load(A_ptr + d * H + h), tl.load(bias_ptr + d * H + h)
        at = (row * L + position) * H + h
        step, _, logs = ssd_steps(dt_ptr, rate, bias, at, inside)
        from_before, to_end, _ = ssd_edges(logs, passed, T)
        dy = ssd_tile(dy_ptr + h * W, row, position, inside, tl.cast(L, tl.int64) * (H * W), H * W, W, BLOCK_W)
        weighted = (dy.to(tl.float32) * from_before[:, None]).to(dy.dtype)
        entering = ssd_load_state(entering_ptr, item * H + h, W, N, BLOCK_W, BLOCK_N)
        dC = tl.dot(weighted, entering, dC, input_precision="tf32x3")
        x = ssd_tile(x_ptr + h * W, row, position, inside, x_row, x_stride, W, BLOCK_W)
        weighted = (x.to(tl.float32) * (step * to_end)[:, None]).to(x.dtype)
        adjoint = ssd_load_state(adjoint_ptr, item * H + h, W, N, BLOCK_W, BLOCK_N)
        dB = tl.dot(weighted, adjoint, dB, input_precision="tf32x3")
        dalike = tl.dot(dy, tl.trans(x), input_precision="tf32x3")
        dalike *= ssd_decays(dalike, logs, passed, T, HAS_STARTS, x.dtype == tl.float32) * step[None, :]
        dalike = dalike.to(x.dtype)
        B = ssd_tile(B_ptr, row, position, inside, k_row, k_stride, N, BLOCK_N)
        dC = tl.dot(dalike, B, dC, input_precision="tf32x3")
        C = ssd_tile(C_ptr, row, position, inside, k_row, k_stride, N, BLOCK_N)
        dB = tl.dot(tl.trans(dalike), C, dB, input_precision="tf32x3")
    rows = tl.num_programs(0).to(tl.int64) // n_chunks
    group = tl.program_id(1) * rows + row
    ssd_store(dB_ptr, dB, group, position, inside, tl.cast(L, tl.int64) * N, N, N, BLOCK_N)
    ssd_store(dC_ptr, dC, group, position, inside, tl.cast(L, tl.int64) * N, N, N, BLOCK_N)
