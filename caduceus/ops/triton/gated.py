"""Mamba-2's gated RMSNorm on the GPU, both directions in one launch. Shapes: P directions, S streams, E channels."""

import torch
import triton
from torch import Tensor

from caduceus.ops.triton import gated_norm_kernels as kernels
from caduceus.ops.triton.device import LAUNCH, device_of, multiprocessors, require_float

_FORWARD, _BACKWARD = 2048, 1024
"""Elements of each tensor that four warps hold at a time; fewer where there are more tensors, because of the registers.
"""


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`caduceus.ops.mamba2.gated_norm`: y (P, S, B, L, E), z (S, B, L, E), weight (P, E), one or two directions."""
    require_float(y, "y")
    return gated_norm_forward(y, z, weight, eps)


def launch_forward(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm (S, B, L, E), in y's type."""
    y, z = y.contiguous(), z.contiguous()
    out = torch.empty(z.shape, dtype=y.dtype, device=y.device)
    rows, E, options = _sizes(z, _FORWARD)
    with device_of(y):
        kernels.gated_norm_forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
            y, z, weight.contiguous(), out, rows, E, eps, P=len(weight), **options
        )
    return out


gated_norm_forward = torch.library.custom_op("caduceus::triton_gated_norm_forward", launch_forward, mutates_args=())


@gated_norm_forward.register_fake
def _(y, z, weight, eps):
    return y.new_empty(z.shape)


def launch_backward(dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z and weight."""
    y, z = y.contiguous(), z.contiguous()
    dy, dz = torch.empty_like(y), torch.empty_like(z)
    rows, E, options = _sizes(z, _BACKWARD)
    programs = min(triton.cdiv(rows, options["ROWS"]), 4 * multiprocessors(y.device))
    dweight = y.new_empty(len(weight), programs, E, dtype=torch.float32)
    with device_of(y):
        kernels.gated_norm_backward_kernel[(programs,)](
            y, z, weight.contiguous(), dout.contiguous(), dy, dz, dweight, rows, E, eps, P=len(weight), **options
        )
    return dy, dz, dweight.sum(1).to(weight.dtype)


gated_norm_backward = torch.library.custom_op("caduceus::triton_gated_norm_backward", launch_backward, mutates_args=())


@gated_norm_backward.register_fake
def _(dout, y, z, weight, eps):
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _save_for_backward(ctx, inputs, output):
    y, z, weight, ctx.eps = inputs
    ctx.save_for_backward(y, z, weight)


def _backward(ctx, dout):
    return *gated_norm_backward(dout, *ctx.saved_tensors, ctx.eps), None


gated_norm_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _sizes(z: Tensor, elements: int) -> tuple[int, int, dict]:
    """(rows, E, compile-time options), with more warps for rows of more than `elements`."""
    E = z.shape[-1]
    block = triton.next_power_of_2(E)
    warps = min(32, LAUNCH["num_warps"] * max(1, block // elements))
    return z.numel() // E, E, {"ROWS": max(1, elements // block), "BLOCK": block, **LAUNCH, "num_warps": warps}
