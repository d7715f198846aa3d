"""Head + cross-entropy at labelled positions on the GPU. Shapes: S streams, B sequences, D channels, V vocabulary."""

import torch
import triton
from torch import Tensor

from caduceus.ops.triton import cross_entropy_kernels as kernels
from caduceus.ops.triton.device import LAUNCH, device_of, multiprocessors, require_float

ROWS, CHANNELS = 16, 32
"""Tile of a program."""
MASKED_REGISTERS = 168
"""The limit of the backward pass where channels fill no whole tile. Without it the assembler of Triton 3.6 spills."""


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, ignore_label: int
) -> tuple[Tensor, Tensor]:
    """`caduceus.ops.head_cross_entropy`."""
    require_float(hidden, "hidden")
    return cross_entropy_forward(hidden, weight, labels, loss_weights, ignore_label)


def launch_forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, ignore_label: int
) -> tuple[Tensor, Tensor]:
    S, V, D = weight.shape
    B, L = labels.shape
    sequence_tiles = triton.cdiv(L, ROWS)
    tiles = B * sequence_tiles
    operands = (hidden, weight, labels, labels if loss_weights is None else loss_weights)
    sums = hidden.new_empty(2, B, sequence_tiles, dtype=torch.float32)
    with device_of(hidden):
        kernels.cross_entropy_forward_kernel[(_programs(tiles, hidden),)](
            *(operand.contiguous() for operand in operands),
            sums,
            *(S, B * L, L, sequence_tiles, tiles, D, V, ignore_label),
            HAS_WEIGHTS=loss_weights is not None,
            **_options(V),
        )
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
    """Gradients of hidden and weight; dloss (B,)."""
    S, V, D = weight.shape
    tokens = labels.numel()
    programs = _programs(triton.cdiv(tokens, ROWS), hidden)
    token_gradient = torch.where((labels < 0) | (labels >= V), torch.nan, dloss.float()[:, None])
    if loss_weights is not None:
        token_gradient = token_gradient * loss_weights
    operands = (hidden, weight, labels, token_gradient.float())
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    dweight = torch.zeros(programs, *weight.shape, dtype=torch.float32, device=weight.device)
    with device_of(hidden):
        kernels.cross_entropy_backward_kernel[(programs,)](
            *(operand.contiguous() for operand in operands),
            *(dhidden, dweight, S, tokens, D, V, ignore_label),
            **{**_options(V), **({"maxnreg": MASKED_REGISTERS} if D % CHANNELS else {})},
        )
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
    return *cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.ignore_label), None, None, None


cross_entropy_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _programs(tiles: int, tensor: Tensor) -> int:
    return max(1, min(tiles, 4 * multiprocessors(tensor.device)))


def _options(V: int) -> dict[str, object]:
    """Compile-time options of both kernels."""
    return {"ROWS": ROWS, "VB": max(16, triton.next_power_of_2(V)), "DB": CHANNELS, **LAUNCH}
