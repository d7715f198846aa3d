"""Residual add + RMSNorm / LayerNorm on the GPU, over all streams in one launch. Shapes: S streams, D channels."""

import torch
import triton
from torch import Tensor

from caduceus.ops.triton import norm_kernels as kernels
from caduceus.ops.triton.device import LAUNCH, device_of, multiprocessors, require_float


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`caduceus.ops.add_norm`."""
    require_float(x, "x")
    out, total = add_norm_forward(x, residual, weight, bias, eps, out_dtype)
    return out, x if residual is None else total


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum in the residual's type; empty where there is no residual)."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    total = x.new_empty(0) if residual is None else torch.empty_like(residual)
    rows, stream_rows, D, options = _sizes(x, weight)
    grid = (triton.cdiv(rows, options["ROWS"]),)
    with device_of(x):
        kernels.add_norm_forward_kernel[grid](
            x,
            x if residual is None else residual,
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            total,
            out,
            rows,
            stream_rows,
            D,
            eps,
            HAS_RESIDUAL=residual is not None,
            LAYER_NORM=bias is not None,
            **options,
        )
    return out, total


add_norm_forward = torch.library.custom_op("caduceus::triton_add_norm_forward", launch_forward, mutates_args=())


@add_norm_forward.register_fake
def _(x, residual, weight, bias, eps, out_dtype):
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape, dtype=out_dtype), total


def launch_backward(
    dout: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, layer_norm: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x and of the residual, of the weight, of the bias); the first in the sum's type."""
    total = total.contiguous()
    dsum = torch.empty_like(total)
    _, stream_rows, D, options = _sizes(total, weight)
    streams = len(weight) if weight.ndim == 2 else 1
    programs = min(triton.cdiv(stream_rows, options["ROWS"]), 4 * multiprocessors(total.device))
    dweight, dbias = (total.new_empty(streams, programs, D, dtype=torch.float32) for _ in range(2))
    with device_of(total):
        kernels.add_norm_backward_kernel[(programs, streams)](
            total,
            weight.contiguous(),
            dout.contiguous(),
            total if dtotal is None else dtotal.contiguous(),
            dsum,
            dweight,
            dbias,
            stream_rows,
            D,
            eps,
            HAS_DTOTAL=dtotal is not None,
            LAYER_NORM=layer_norm,
            **options,
        )
    dweight, dbias = (t.sum(1).view_as(weight).to(weight.dtype) for t in (dweight, dbias))
    return dsum, dweight, dbias


add_norm_backward = torch.library.custom_op("caduceus::triton_add_norm_backward", launch_backward, mutates_args=())


@add_norm_backward.register_fake
def _(dout, dtotal, total, weight, layer_norm, eps):
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save_for_backward(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, _ = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight)
    ctx.x_dtype, ctx.has_residual, ctx.layer_norm = x.dtype, residual is not None, bias is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dtotal):
    total, weight = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(total)
    dtotal = dtotal if ctx.has_residual else None
    dsum, dweight, dbias = add_norm_backward(dout, dtotal, total, weight, ctx.layer_norm, ctx.eps)
    dresidual = dsum if ctx.has_residual else None
    return dsum.to(ctx.x_dtype), dresidual, dweight, dbias if ctx.layer_norm else None, None, None


add_norm_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int, dict]:
    """(rows, rows that share a weight, D, compile-time options)."""
    D = x.shape[-1]
    rows = x.numel() // D
    block = triton.next_power_of_2(D)
    options = {"ROWS": max(1, 2048 // block), "BLOCK": block, **LAUNCH}
    return rows, rows // len(x) if weight.ndim == 2 else rows, D, options
