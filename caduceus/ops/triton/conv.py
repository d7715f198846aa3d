"""The causal convolution on the GPU: launches of conv_kernels.py as torch custom ops with gradients.

Shapes: P parameter directions, S streams, B batch, L length, E inner channels, K convolution width.
"""

import torch
import triton
from torch import Tensor

from caduceus.ops.triton import conv_kernels as kernels
from caduceus.ops.triton.device import LAUNCH, as_rows, channel_block, device_of, require_float, tokens_per_program

TOKENS, CHANNELS = 16, 64
"""Tile of a forward program; it has half as many channels where rows are not aligned, as that takes more registers."""
STEPS = 4
"""Tokens that a backward program unrolls."""
RESIDENT = 9
"""Backward programs that a multiprocessor has registers for."""


def bidirectional_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None = None,
    halo: Tensor | None = None,
    activation: str | None = "silu",
    reverse: bool = False,
) -> Tensor:
    """`caduceus.ops.bidirectional_conv1d`. halo (P, S, B, K - 1, E): what precedes the sequence in each direction.

    `reverse` exchanges the directions of all streams.
    """
    require_float(x, "x")
    return conv_forward(x, weight, bias, halo, starts, activation == "silu", reverse)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    reverse: bool,
    starts: Tensor | None = None,
) -> Tensor:
    """`caduceus.ops.causal_conv1d`: x (B, L, E) -> (B, L, E)."""
    bias = None if bias is None else bias[None]
    return bidirectional_conv1d(x[None], weight[None], bias, starts, None, activation, reverse).squeeze((0, 1))


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    halo: Tensor | None,
    starts: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    P, (S, batch, length, E) = len(weight), x.shape
    out = x.new_empty(P, S, batch, length, E)
    operands, sizes, options = _arguments(x, weight, bias, halo, starts, silu)
    channels = CHANNELS if E % 16 == 0 else CHANNELS // 2
    grid = S * batch * triton.cdiv(length, TOKENS), triton.cdiv(E, channels)
    with device_of(x):
        kernels.conv_forward_kernel[grid](
            *(*operands, out, *sizes, int(reverse), *operands[0].stride()[:2]),
            **options,
            TOKENS=TOKENS,
            BLOCK=channels,
        )
    return out


conv_forward = torch.library.custom_op("caduceus::triton_conv_forward", launch_forward, mutates_args=())


@conv_forward.register_fake
def _(x, weight, bias, halo, starts, silu, reverse):
    return x.new_empty(len(weight), *x.shape)


def launch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    halo: Tensor | None,
    starts: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and halo; empty for operands that are not given."""
    dy = dy.contiguous()
    P, E, K = weight.shape
    S, batch, length, _ = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = channel_block(x)
    blocks = triton.cdiv(E, block)
    chunk = tokens_per_program(S * batch, length, blocks, RESIDENT, x.device)
    chunks = triton.cdiv(length, chunk)
    items = S * batch * chunks
    dw = x.new_empty(items, P, K, E, dtype=torch.float32)
    dbias = x.new_empty(items, P, E, dtype=torch.float32)
    operands, _, options = _arguments(x, weight, bias, halo, starts, silu)
    x_row, x_token = operands[0].stride()[:2]
    options |= {"BLOCK": block, "STEPS": STEPS, "P": P, "E": E, "x_token": x_token}
    sizes = S, batch, length
    with device_of(x):
        kernels.conv_backward_kernel[(items, blocks)](
            *(*operands, dy, dx, dw, dbias, *sizes, chunks, chunk, int(reverse), x_row), **options, OF_HALO=False
        )
        if halo is None:
            dhalo = x.new_empty(0)
        else:
            dhalo = torch.empty(halo.shape, dtype=halo.dtype, device=x.device)
            kernels.conv_backward_kernel[(2 * S * batch, blocks)](
                *(*operands, dy, dhalo, dw, dbias, *sizes, 2, K - 1, int(reverse), x_row), **options, OF_HALO=True
            )
    dw = dw.sum(0).flip(1).transpose(1, 2).to(weight.dtype).contiguous()
    return dx, dw, x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype), dhalo


conv_backward = torch.library.custom_op("caduceus::triton_conv_backward", launch_backward, mutates_args=())


@conv_backward.register_fake
def _(dy, x, weight, bias, halo, starts, silu, reverse):
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return tuple(like(t) for t in (x, weight, bias, halo))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    x, weight, bias, halo, starts = ctx.saved_tensors
    dx, dw, dbias, dhalo = conv_backward(dy, x, weight, bias, halo, starts, ctx.silu, ctx.reverse)
    return dx, dw, None if bias is None else dbias, None if halo is None else dhalo, None, None, None


conv_forward.register_autograd(_backward, setup_context=_save_for_backward)


def _arguments(x, weight, bias, halo, starts, silu) -> tuple[tuple, tuple, dict]:
    """(tensors, sizes, compile-time options) of both kernels."""
    P, E, K = weight.shape
    S, batch, length, _ = x.shape
    if K > TOKENS:
        raise ValueError(f"weight: the triton backend convolves over up to {TOKENS} positions, got {K}")
    rows = as_rows(x)
    # Absent operands are never read, but the kernels need a pointer.
    tensors = rows, weight, *(x if t is None else t for t in (bias, halo, starts))
    tensors = (rows, *(t if t is x else t.contiguous() for t in tensors[1:]))
    options = {"K": K, "SILU": silu, **LAUNCH}
    options |= {"HAS_BIAS": bias is not None, "HAS_HALO": halo is not None, "HAS_STARTS": starts is not None}
    return tensors, (P, S, batch, length, E), options
