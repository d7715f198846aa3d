"""Kernels of Mamba-2's gated RMSNorm: a program takes a few rows of E channels of all directions; fp32 inside."""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES


@triton.jit(do_not_specialize=SIZES)
def gated_norm_forward_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, rows, E, eps, P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out (rows, E): the sum over directions of norm(y silu(z)) times weight, y (P, rows, E), weight (P, E)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < E)[None, :]
    at = row[:, None] * E + column[None, :]
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = z / (1.0 + tl.exp(-z))
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for direction in tl.static_range(P):
        own = tl.cast(rows, tl.int64) * E * direction
        gated = tl.load(y_ptr + own + at, mask=mask, other=0.0).to(tl.float32) * gate
        scale = 1.0 / tl.sqrt(tl.sum(gated * gated, axis=1) / E + eps)
        w = tl.load(weight_ptr + direction * E + column, mask=column < E, other=0.0).to(tl.float32)
        total += gated * scale[:, None] * w[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def gated_norm_backward_kernel(
    y_ptr,
    z_ptr,
    weight_ptr,
    dout_ptr,
    dy_ptr,
    dz_ptr,
    dweight_ptr,
    rows,
    E,
    eps,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dy (P, rows, E), dz (rows, E), and dweight (P, programs, E) of the rows of each program."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < E
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * E + column[None, :]
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        gate = z * sigmoid
        dgate = tl.zeros([ROWS, BLOCK], tl.float32)
        for direction in tl.static_range(P):
            own = tl.cast(rows, tl.int64) * E * direction
            y = tl.load(y_ptr + own + at, mask=mask, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + direction * E + column, mask=inside, other=0.0).to(tl.float32)
            gated = y * gate
            scale = 1.0 / tl.sqrt(tl.sum(gated * gated, axis=1) / E + eps)
            normed = gated * scale[:, None]
            if direction == 0:
                first += tl.sum(dout * normed, axis=0)
            else:
                second += tl.sum(dout * normed, axis=0)
            dnormed = dout * w[None, :]
            along = tl.sum(dnormed * normed, axis=1) / E
            dgated = (dnormed - normed * along[:, None]) * scale[:, None]
            tl.store(dy_ptr + own + at, (dgated * gate).to(dy_ptr.dtype.element_ty), mask=mask)
            dgate += dgated * y
        dz = dgate * sigmoid * (1.0 + z * (1.0 - sigmoid))
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    slot = tl.cast(program, tl.int64) * E + column
    tl.store(dweight_ptr + slot, first, mask=inside)
    if P == 2:
        tl.store(dweight_ptr + tl.cast(programs, tl.int64) * E + slot, second, mask=inside)
