"""Kernels of residual add + RMSNorm / LayerNorm: a program takes a few rows of D channels; fp32 inside."""

import triton
import triton.language as tl

from caduceus.ops.triton.device import SIZES


@triton.jit(do_not_specialize=SIZES)
def add_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    out_ptr,
    rows,
    stream_rows,
    D,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    LAYER_NORM: tl.constexpr,
):
    """total = residual + x and out = norm(total), (rows, D); every stream_rows rows share a weight (D,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    total = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=mask)
        total = rounded.to(tl.float32)  # what the backward pass will read
    if LAYER_NORM:
        mean = tl.sum(total, axis=1) / D
        total = tl.where(mask, total - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=1) / D + eps)
    own = (row // stream_rows)[:, None] * D + column[None, :]
    out = total * scale[:, None] * tl.load(weight_ptr + own, mask=mask, other=0.0).to(tl.float32)
    if LAYER_NORM:
        out += tl.load(bias_ptr + own, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def add_norm_backward_kernel(
    total_ptr,
    weight_ptr,
    dout_ptr,
    dtotal_ptr,
    dsum_ptr,
    dweight_ptr,
    dbias_ptr,
    stream_rows,
    D,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DTOTAL: tl.constexpr,
    LAYER_NORM: tl.constexpr,
):
    """dsum (rows, D), the gradient of x and residual alike; dweight and dbias (streams, programs, D) per program."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    stream = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    w = tl.load(weight_ptr + stream * D + column, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(stream_rows, ROWS), programs):
        local = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (local < stream_rows)[:, None] & inside[None, :]
        at = (stream * stream_rows + local)[:, None] * D + column[None, :]
        total = tl.load(total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if LAYER_NORM:
            mean = tl.sum(total, axis=1) / D
            total = tl.where(mask, total - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=1) / D + eps)
        normed = total * scale[:, None]
        dweight += tl.sum(dout * normed, axis=0)
        dbias += tl.sum(dout, axis=0)
        dnormed = dout * w[None, :]
        along = tl.sum(dnormed * normed, axis=1) / D
        dsum = dnormed - normed * along[:, None]
        if LAYER_NORM:
            dsum -= (tl.sum(dnormed, axis=1) / D)[:, None]
        dsum *= scale[:, None]
        if HAS_DTOTAL:
            dsum += tl.load(dtotal_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dsum_ptr + at, dsum.to(dsum_ptr.dtype.element_ty), mask=mask)
    slot = (stream * programs + program) * D + column
    tl.store(dweight_ptr + slot, dweight, mask=inside)
    tl.store(dbias_ptr + slot, dbias, mask=inside)
