"""The selective scan on the CPU: torch operators over scan_kernels.py and scan_backward_kernels.py."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from caduceus.ops.cpu import scan_backward_kernels as backward_kernels
from caduceus.ops.cpu import scan_kernels as kernels
from caduceus.ops.cpu.arrays import copied, flattened, lead, run_kernel
from caduceus.ops.cpu.vectors import LANES
from caduceus.ops.operands import ScanOperands


def selective_scan(
    operands: ScanOperands, softplus: bool, reverse: bool, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `naive.selective_scan`: y (B, L, E) in u's type and the state (B, E, N) after the last step taken."""
    y, state = _scan_in_one_type(operands.unsqueezed(), lead(initial_state, 2), softplus, reverse)
    return y.squeeze(0), state.squeeze((0, 1))


def bidirectional_scan(operands: ScanOperands) -> Tensor:
    """All directions and streams of `ops.bidirectional_scan` in one pass over memory."""
    return _scan_in_one_type(operands, None, True, False)[0]


def _scan_in_one_type(
    operands: ScanOperands, initial_state: Tensor | None, softplus: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(operands.u.dtype, torch.float32)
    tensors = [None if t is None else t.to(compute) for t in (*operands, initial_state)]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, state, _ = _scan(*tensors, softplus, reverse, keep)
    return y.to(operands.u.dtype), state


class SlicedScan:
    """`across_ranks.SlicedScan`: the operands in the type of the arithmetic, and the gradients back in their own."""

    def __init__(self, operands: ScanOperands, softplus: bool, reverse: bool) -> None:
        self.given = operands
        self.compute = torch.promote_types(operands.u.dtype, torch.float32)
        self.operands = ScanOperands(*(None if t is None else t.to(self.compute) for t in operands))
        self.softplus, self.reverse = softplus, reverse

    def end_state(self) -> tuple[Tensor, Tensor]:
        dt, dt_bias = self.operands.dt, self.operands.dt_bias
        _, state, _ = _scan(*self.operands, None, self.softplus, self.reverse, False)
        steps = dt if dt_bias is None else dt + dt_bias[:, None, None, None]
        return state, (F.softplus(steps) if self.softplus else steps).sum(3)

    def outputs(self, initial_state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, _, kept = _scan(*self.operands, initial_state, self.softplus, self.reverse, True)
        return y.to(self.given.u.dtype), (kept,)

    def initial_gradient(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        u, dt, A, _, C, _, z, dt_bias = self.operands
        dy = dy.to(self.compute)
        tensors, strides = zip(*(flattened(t) for t in (dy, dt, C, u[0] if z is None else z)), strict=True)
        rates, _, bias = _scan_parameters(A, None, dt_bias)
        directions, streams, batch, length, channels = u.shape
        gradient = np.empty((directions, streams, batch, A.shape[2], channels), rates.dtype)
        run_kernel(
            backward_kernels.initial_state_gradient,
            _scan_items(dy, _block(channels)),
            (*tensors, rates, bias),
            strides,
            (self.softplus, z is not None, self.reverse, length),
            _block(channels),
            gradient,
        )
        return torch.from_numpy(gradient).transpose(-1, -2).contiguous()

    def gradients(self, dy: Tensor, final_gradient: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        dy = dy.to(self.compute)
        found = _scan_backward(dy, final_gradient, *kept, *self.operands, self.softplus, self.reverse)
        return tuple(None if t is None else g.to(t.dtype) for t, g in zip(self.given, found, strict=False))


# Operators. P parameter directions, S streams; direction d runs stream s right-to-left where (d != s % 2) != reverse.


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
    tensors, strides = zip(*(flattened(t) for t in (u, dt, B, C, u[0] if z is None else z, y)), strict=True)
    block = _forward_block(y)
    run_kernel(
        kernels.scan_forward,
        _scan_items(y, block),
        (*tensors[:5], *_scan_parameters(A, D, dt_bias), states),
        strides,
        (softplus, z is not None, reverse, keep, y.shape[2]),
        block,
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
    tensors, strides = zip(*(flattened(t) for t in inputs), strict=True)
    run_kernel(
        backward_kernels.scan_backward,
        _scan_items(grad, _block(channels)),
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
    ctx.set_materialize_grads(False)  # zeros for the kept states would cost as much as a tensor of inputs
    ctx.shapes = (output[0].shape, output[1].shape)


def _scan_gradients(ctx, grad, grad_final, _):
    *inputs, kept = ctx.saved_tensors
    grad, grad_final = (
        kept.new_zeros(shape) if given is None else given
        for given, shape in zip((grad, grad_final), ctx.shapes, strict=True)
    )
    *gradients, g_initial = _scan_backward(grad, grad_final, kept, *inputs, ctx.softplus, ctx.reverse)
    optional = [g if present else None for g, present in zip([*gradients[5:], g_initial], ctx.optional, strict=True)]
    return *gradients[:5], *optional, None, None, None


_scan.register_autograd(_scan_gradients, setup_context=_save_scan)


def _block(channels: int, most: int = kernels.BLOCK) -> int:
    """Channels per item: as even as whole lanes allow, so that the last block is not nearly empty."""
    blocks = math.ceil(channels / most)
    return math.ceil(channels / blocks / LANES) * LANES


def _forward_block(y: Tensor) -> int:
    """Channels of a block: as many as leave work for every thread.

    A channel's results do not depend on those beside it. Sums over channels in the backward pass do, and so its block
    does not depend on the number of threads.
    """
    streams, batch, _, channels = y.shape
    parts = math.ceil(torch.get_num_threads() / max(1, streams * batch))
    return _block(channels, max(LANES, min(kernels.FORWARD_BLOCK, math.ceil(channels / parts))))


def _scan_items(y: Tensor, block: int) -> int:
    streams, batch, _, channels = y.shape
    return streams * batch * math.ceil(channels / block)


def _scan_parameters(A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> tuple[np.ndarray, ...]:
    """A as base-2 rates (P, N, E); D and the bias (P, E), zero where there is none."""
    zeros = A.new_zeros(A.shape[:2])
    return _states_first(A * math.log2(math.e)), *(copied(zeros if t is None else t) for t in (D, dt_bias))


def _states_first(states: Tensor) -> np.ndarray:
    """(..., E, N) -> (..., N, E)."""
    return states.transpose(-1, -2).contiguous().numpy()
