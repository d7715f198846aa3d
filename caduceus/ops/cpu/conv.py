"""The causal convolution on the CPU: torch operators over conv_kernels.py."""

import math

import numpy as np
import torch
from torch import Tensor

from caduceus.ops.cpu import conv_kernels
from caduceus.ops.cpu.arrays import copied, flattened, lead, run_kernel


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, reverse: bool) -> Tensor:
    """As `naive.causal_conv1d`: x (B, L, E), weight (E, K), bias (E,) -> (B, L, E) in x's type."""
    x, weight, bias = (lead(t, 1) for t in (x, weight, bias))
    return _conv_in_one_type(x, weight, bias, activation == "silu", reverse).squeeze((0, 1))


def bidirectional_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All directions and streams of `ops.bidirectional_conv1d` in one pass over memory."""
    return _conv_in_one_type(x, weight, bias, True, False)


def _conv_in_one_type(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    y = _conv(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute), silu, reverse)
    return y.to(x.dtype)


@torch.library.custom_op(
    "caduceus::cpu_conv",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor",
)
def _conv(x, weight, bias, silu, reverse):
    """x (S, B, L, E), weight (P, E, K), bias (P, E) -> (P, S, B, L, E)."""
    y = _conv_output(x, weight, bias, silu, reverse)
    flat, strides = flattened(x)
    run_kernel(
        conv_kernels.conv_forward,
        y.shape[0] * _conv_items(x),
        flat,
        strides,
        *_taps(weight, bias),
        silu,
        reverse,
        y.numpy(),
    )
    return y


@_conv.register_fake
def _conv_output(x, weight, bias, silu, reverse):
    return x.new_empty(weight.shape[0], *x.shape)


@torch.library.custom_op(
    "caduceus::cpu_conv_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> (Tensor, Tensor, Tensor)",
)
def _conv_backward(grad, x, weight, bias, silu, reverse):
    """Gradients of x, weight and bias."""
    gx = x.new_empty(x.shape)
    directions, channels, width = weight.shape
    parts = np.empty((_conv_items(x), directions, width + 1, channels), gx.numpy().dtype)
    taps, bias = _taps(weight, bias)
    arrays = *flattened(grad), *flattened(x), taps, bias
    run_kernel(conv_kernels.conv_backward, len(parts), *arrays, silu, reverse, gx.numpy(), parts)
    sums = torch.from_numpy(parts.sum(0))
    return gx, sums[:, :width].transpose(1, 2).contiguous(), sums[:, width].clone()


@_conv_backward.register_fake
def _(grad, x, weight, bias, silu, reverse):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _save_conv(ctx, inputs, output):
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    gx, g_weight, g_bias = _conv_backward(grad, x, weight, bias, ctx.silu, ctx.reverse)
    return gx, g_weight, None if bias is None else g_bias, None, None


_conv.register_autograd(_conv_gradients, setup_context=_save_conv)


def _conv_items(x: Tensor) -> int:
    streams, batch, length, _ = x.shape
    return streams * batch * math.ceil(length / conv_kernels.CHUNK)


def _taps(weight: Tensor, bias: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """weight as (P, K, E), and the bias (P, E), zero where there is none."""
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return copied(weight.transpose(1, 2)), copied(bias)
