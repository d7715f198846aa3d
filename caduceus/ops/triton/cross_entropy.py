"""Head + cross-entropy at labelled positions on the GPU. Shapes: S streams, B sequences, D channels, V vocabulary."""

import torch
import triton
from torch import Tensor

from caduceus.ops.triton import cross_entropy_kernels as kernels
from caduceus.ops.triton.device import LAUNCH, device_of, multiprocessors, require_float

ROWS, CHANNELS = 16, 32
"""Tile of a program."""


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, ignore_label: int
) -> tuple[Tensor, Tensor]:
    """`caduceus.ops.head_cross_entropy`."""
    require_float(hidden, "hidden")
    return cross_entropy_forward(hidden, weight, labels, loss_weights, ignore_label)


def launch_forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, ignore_label: int
) -> tuple[Tensor, Tensor]:
    programs, operands, sizes, options = _arguments(hidden, weight, labels, loss_weights, ignore_label)
    B, L = labels.shape
    sums = hidden.new_empty(2, B, triton.cdiv(L, ROWS), dtype=torch.float32)
    with device_of(hidden):
        kernels.cross_entropy_forward_kernel[(programs,)](*operands, sums, *sizes, **options)
    loss_sums, weight_sums = sums.sum(-1)
    return loss_sums.clone(), weight_sums.clone()


cross_entropy_forward = torch.library.custom_op(
    "caduceus::triton_cross_entropy_forward", launch_forward, mutates_args=()
)


@cross_entropy_forward.register_fake
def _(hidden, weight, labels, loss_weights, ignore_label):
    return tuple(hidden.new_empty(labels.shape[0], dtype=torch.float32) for _ in range(2))


def launch_backward(
    dloss: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, ignore_label: int
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; dloss (B,) is contiguous."""
    programs, operands, sizes, options = _arguments(hidden, weight, labels, loss_weights, ignore_label)
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.zeros(programs, *weight.shape, dtype=torch.float32, device=weight.device)
    with device_of(hidden):
        kernels.cross_entropy_backward_kernel[(programs,)](*operands, dloss, dhidden, dweight, *sizes, **options)
    return dhidden, dweight.sum(0).to(weight.dtype)


cross_entropy_backward = torch.library.custom_op(
    "caduceus::triton_cross_entropy_backward", launch_backward, mutates_args=()
)


@cross_entropy_backward.register_fake
def _(dloss, hidden, weight, labels, loss_weights, ignore_label):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.ignore_label = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dloss, _dweight_sum):
    return *cross_entropy_backward(dloss.contiguous(), *ctx.saved_tensors, ctx.ignore_label), None, None, None


cross_entropy_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _arguments(hidden, weight, labels, loss_weights, ignore_label) -> tuple[int, tuple, tuple, dict]:
    """(programs, tensors, sizes, compile-time options) of both kernels."""
    S, V, D = weight.shape
    B, L = labels.shape
    programs = max(1, min(B * triton.cdiv(L, ROWS), 4 * multiprocessors(hidden.device)))
    tensors = (hidden, weight, labels, labels if loss_weights is None else loss_weights)
    options = {"ROWS": ROWS, "VB": max(16, triton.next_power_of_2(V)), "DB": CHANNELS, **LAUNCH}
    options["HAS_WEIGHTS"] = loss_weights is not None
    return programs, tuple(t.contiguous() for t in tensors), (S, B, L, D, V, ignore_label), options
