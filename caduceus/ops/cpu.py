"""The CPU backend: selective scan and causal convolution as torch operators over numba kernels.

Takes what `naive` takes and means the same. Half precision is computed in float32 and returned in the input's type;
float64 stays float64, more slowly. Kernels run on `torch.get_num_threads()` threads and give the same bits for any
number of them. Compiled code is kept on disk (NUMBA_CACHE_DIR, or beside this file, or in the user's cache).
"""

import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba.core import event
from torch import Tensor

from caduceus.ops import cpu_conv_kernels as conv_kernels
from caduceus.ops import cpu_kernels as kernels

_log = logging.getLogger(__name__)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `naive.selective_scan`: y (B, L, E) in u's type and the state (B, E, N) after the last step taken."""
    u, dt, B, C, initial_state = (_lead(t, 2) for t in (u, dt, B, C, initial_state))
    A, D, z, dt_bias = (_lead(t, 1) for t in (A, D, z, dt_bias))
    y, state = _scan_in_one_type(u, dt, A, B, C, D, z, dt_bias, initial_state, softplus, reverse)
    return y[0], state[0, 0]


def bidirectional_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> Tensor:
    """All directions and streams of `ops.bidirectional_scan` in one pass over memory."""
    return _scan_in_one_type(u, dt, A, B, C, D, z, dt_bias, None, True, False)[0]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, reverse: bool) -> Tensor:
    """As `naive.causal_conv1d`: x (B, L, E), weight (E, K), bias (E,) -> (B, L, E) in x's type."""
    x, weight, bias = (_lead(t, 1) for t in (x, weight, bias))
    return _conv_in_one_type(x, weight, bias, activation == "silu", reverse)[0, 0]


def bidirectional_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All directions and streams of `ops.bidirectional_conv1d` in one pass over memory."""
    return _conv_in_one_type(x, weight, bias, True, False)


def _lead(tensor: Tensor | None, axes: int) -> Tensor | None:
    return None if tensor is None else tensor[(None,) * axes]


def _scan_in_one_type(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(u.dtype, torch.float32)
    tensors = [None if t is None else t.to(compute) for t in (u, dt, A, B, C, D, z, dt_bias, initial_state)]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, state, _ = _scan(*tensors, softplus, reverse, keep)
    return y.to(u.dtype), state


def _conv_in_one_type(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    y = _conv(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute), silu, reverse)
    return y.to(x.dtype)


# Operators. P parameter directions, S streams; direction d runs stream s right-to-left where (d != s) != reverse.


@torch.library.custom_op(
    "caduceus::cpu_scan",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias,"
    " Tensor? initial_state, bool softplus, bool reverse, bool keep) -> (Tensor, Tensor, Tensor)",
)
def _scan(u, dt, A, B, C, D, z, dt_bias, initial_state, softplus, reverse, keep):
    """u, dt (P, S, B, L, E); A (P, E, N); B, C (P, S, B, L, N); D, dt_bias (P, E); z (S, B, L, E); initial_state
    (P, S, B, E, N). Returns y (S, B, L, E), summed over P; the final states (P, S, B, E, N); and for the backward
    pass (`keep`) the state before every chunk of tokens (P, S, B, chunks, N, E)."""
    y, final, kept = _scan_outputs(u, dt, A, B, C, D, z, dt_bias, initial_state, softplus, reverse, keep)
    states = torch.zeros_like(final) if initial_state is None else initial_state
    states, final = _states_first(states), _states_first(final)
    tensors, strides = zip(*(_flat(t) for t in (u, dt, B, C, u[0] if z is None else z, y)), strict=True)
    _run(
        kernels.scan_forward,
        _scan_items(y),
        (*tensors[:5], *_scan_parameters(A, D, dt_bias), states),
        strides,
        (softplus, z is not None, reverse, keep, y.shape[2]),
        _block(y.shape[3]),
        tensors[5],
        final,
        kept.numpy(),
    )
    return y, torch.from_numpy(final).transpose(-1, -2).contiguous(), kept


@_scan.register_fake
def _scan_outputs(u, dt, A, B, C, D, z, dt_bias, initial_state, softplus, reverse, keep):
    directions, streams, batch, length, channels = u.shape
    states = A.shape[2]
    chunks = (length + kernels.CHUNK - 1) // kernels.CHUNK if keep else 0
    y = u.new_empty(streams, batch, length, channels)
    final = u.new_empty(directions, streams, batch, channels, states)
    return y, final, u.new_empty(directions, streams, batch, chunks, states, channels)


@torch.library.custom_op(
    "caduceus::cpu_scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor grad_final, Tensor kept, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? z, Tensor? dt_bias, bool softplus, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan_backward(grad, grad_final, kept, u, dt, A, B, C, D, z, dt_bias, softplus, reverse):
    """Gradients of u, dt, A, B, C, D, z (empty without z), dt_bias and the initial state."""
    directions, streams, batch, length, channels = u.shape
    states = A.shape[2]
    gu, gdt, gz = u.new_empty(u.shape), u.new_empty(u.shape), u.new_empty(grad.shape if z is not None else 0)
    blocks = math.ceil(channels / _block(channels))
    per_block = [np.empty((blocks, *B.shape), kept.numpy().dtype) for _ in range(2)]
    per_row = [
        np.empty((directions, streams, batch, *axes), per_block[0].dtype)
        for axes in ((states, channels), (channels,), (channels,))
    ]
    g_initial = np.empty((directions, streams, batch, states, channels), per_block[0].dtype)
    inputs = (grad, u, dt, B, C, u[0] if z is None else z, gu, u[0] if z is None else gz)
    tensors, strides = zip(*(_flat(t) for t in inputs), strict=True)
    _run(
        kernels.scan_backward,
        _scan_items(grad),
        (*tensors[:6], *_scan_parameters(A, D, dt_bias), _states_first(grad_final)),
        strides,
        (softplus, z is not None, reverse, length),
        _block(channels),
        kept.numpy(),
        (tensors[6], gdt.view(-1).numpy(), gz.view(-1).numpy()),
        (*per_block, *per_row, g_initial),
    )
    gB, gC = (torch.from_numpy(t.sum(0)) for t in per_block)
    gA, gD, g_bias = (torch.from_numpy(t.sum((1, 2))) for t in per_row)
    g_initial = torch.from_numpy(g_initial).transpose(-1, -2).contiguous()
    return gu, gdt, gA.transpose(-1, -2).contiguous(), gB, gC, gD, gz, g_bias, g_initial


@_scan_backward.register_fake
def _(grad, grad_final, kept, u, dt, A, B, C, D, z, dt_bias, softplus, reverse):
    gz = u.new_empty(grad.shape if z is not None else 0)
    row = A.new_empty(A.shape[:2])
    new = (t.new_empty(t.shape) for t in (u, dt, A, B, C))
    return *new, row, gz, torch.empty_like(row), grad_final.new_empty(grad_final.shape)


def _save_scan(ctx, inputs, output):
    u, dt, A, B, C, D, z, dt_bias, initial_state, ctx.softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(u, dt, A, B, C, D, z, dt_bias, output[2])
    ctx.optional = (D is not None, z is not None, dt_bias is not None, initial_state is not None)
    ctx.mark_non_differentiable(output[2])


def _scan_gradients(ctx, grad, grad_final, _):
    *inputs, kept = ctx.saved_tensors
    *gradients, g_initial = _scan_backward(grad, grad_final, kept, *inputs, ctx.softplus, ctx.reverse)
    optional = [g if present else None for g, present in zip([*gradients[5:], g_initial], ctx.optional, strict=True)]
    return *gradients[:5], *optional, None, None, None


_scan.register_autograd(_scan_gradients, setup_context=_save_scan)


@torch.library.custom_op(
    "caduceus::cpu_conv",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse) -> Tensor",
)
def _conv(x, weight, bias, silu, reverse):
    """x (S, B, L, E), weight (P, E, K), bias (P, E) -> (P, S, B, L, E)."""
    y = _conv_output(x, weight, bias, silu, reverse)
    flat, strides = _flat(x)
    _run(
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
    _run(conv_kernels.conv_backward, len(parts), *_flat(grad), *_flat(x), taps, bias, silu, reverse, gx.numpy(), parts)
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


# From tensors to what the kernels take.


def _block(channels: int) -> int:
    """Channels per item: as even as whole lanes allow, so that the last block is not nearly empty."""
    blocks = math.ceil(channels / kernels.BLOCK)
    return math.ceil(channels / blocks / kernels.LANES) * kernels.LANES


def _scan_items(y: Tensor) -> int:
    streams, batch, _, channels = y.shape
    return streams * batch * math.ceil(channels / _block(channels))


def _conv_items(x: Tensor) -> int:
    streams, batch, length, _ = x.shape
    return streams * batch * math.ceil(length / conv_kernels.CHUNK)


def _scan_parameters(A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> tuple[np.ndarray, ...]:
    """A as base-2 rates (P, N, E); D and the bias (P, E), zero where there is none."""
    zeros = A.new_zeros(A.shape[:2])
    return _states_first(A * math.log2(math.e)), *(_copied(zeros if t is None else t) for t in (D, dt_bias))


def _copied(parameter: Tensor) -> np.ndarray:
    """A copy: `numpy` pins a tensor's memory for good, and FSDP frees that of parameters between uses."""
    return parameter.clone(memory_format=torch.contiguous_format).numpy()


def _states_first(states: Tensor) -> np.ndarray:
    """(..., E, N) -> (..., N, E)."""
    return states.transpose(-1, -2).contiguous().numpy()


def _taps(weight: Tensor, bias: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """weight as (P, K, E), and the bias (P, E), zero where there is none."""
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return _copied(weight.transpose(1, 2)), _copied(bias)


def _flat(tensor: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """A tensor's memory as a flat array, and its strides over (P, S, B, L), 0 for a leading axis that it lacks.

    No copy as long as neighbouring channels are neighbours in memory, as in a slice of a projection's output.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    strides = tensor.stride()[:-1]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
    return flat.numpy(), (0,) * (4 - len(strides)) + strides


# Threads: our own, because numba's pools abort the process when it forks or two threads call them.


def _run(kernel: Callable, items: int, *arguments) -> None:
    """Run a kernel's items in equal shares on torch's number of threads, this one among them."""
    shares = max(1, min(torch.get_num_threads(), items))
    bounds = [items * share // shares for share in range(shares + 1)]
    others = [_pool(shares).submit(kernel, *bounds[i : i + 2], *arguments) for i in range(1, shares)]
    kernel(*bounds[:2], *arguments)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="caduceus-cpu")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


class _CompilationNotice(event.Listener):
    """Says once that compilation has begun, since it takes a while and is not repeated."""

    said = False

    def on_start(self, event):
        if not self.said and event.data["dispatcher"].py_func.__module__ in (kernels.__name__, conv_kernels.__name__):
            self.said = True
            _log.info("compiling the CPU kernels: some seconds, once on this machine")

    def on_end(self, event):
        pass


event.register("numba:compile", _CompilationNotice())
