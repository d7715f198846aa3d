"""The selective scan on the GPU: what scan_launches.py computes, as torch custom ops with gradients.

Shapes: P parameter directions, S streams, B batch, L length, E inner channels, N states.
"""

import torch
from torch import Tensor

from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import scan_launches as launches
from caduceus.ops.triton.device import require_float, tokens_per_program

MAX_STATES = 64
"""In most kernels a thread holds all states of its channel: up to 64 they fit in its registers, and none spills."""


def scan_with_states(
    operands: ScanOperands,
    softplus: bool = True,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    reverse: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (S, B, L, E), states after the last steps taken (P, S, B, E, N)), both differentiable.

    The operands are those of `caduceus.ops.bidirectional_scan`; initial_state (P, S, B, E, N); starts as in
    `ops.packed`. With `reverse` all directions are exchanged; `chunk` is the number of tokens that one program takes.
    """
    require_float(operands.u, "u")
    states = operands.A.shape[-1]
    if states > MAX_STATES:
        raise ValueError(f"A: the triton backend has up to {MAX_STATES} states, got {states}")
    if chunk is None:
        chunk = chunk_length(operands.u)
    if chunk % launches.PIECE:
        raise ValueError(f"chunk: must be a multiple of {launches.PIECE}, got {chunk}")
    y, final_state, _, _ = scan_forward(*operands, initial_state, starts, softplus, reverse, chunk)
    return y, final_state


def bidirectional_scan(operands: ScanOperands, starts: Tensor | None = None) -> Tensor:
    """`caduceus.ops.bidirectional_scan`."""
    return scan_with_states(operands, starts=starts)[0]


def selective_scan(
    operands: ScanOperands,
    softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (B, L, E), final state (B, E, N)) of `caduceus.ops.selective_scan`."""
    y, final_state = scan_with_states(
        operands.unsqueezed(),
        softplus,
        None if initial_state is None else initial_state[None, None],
        starts,
        reverse,
    )
    return y.squeeze(0), final_state.squeeze((0, 1))


scan_forward = torch.library.custom_op("caduceus::triton_scan_forward", launches.launch_forward, mutates_args=())


@scan_forward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, initial_state, starts, softplus, reverse, chunk):
    P, S, batch, length, E = u.shape
    rows, chunks, N = P * S * batch, -(-length // chunk), A.shape[-1]
    return (
        u.new_empty(S, batch, length, E),
        A.new_empty(P, S, batch, N, E, dtype=torch.float32).transpose(-1, -2),
        A.new_empty(rows, chunks, N, E, dtype=torch.float32),
        A.new_empty(rows, chunks, E, dtype=torch.float32),
    )


scan_backward = torch.library.custom_op("caduceus::triton_scan_backward", launches.launch_backward, mutates_args=())


@scan_backward.register_fake
def _(dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, starts, states, sum_dt, softplus, reverse, chunk):
    def like(tensor: Tensor | None) -> Tensor:
        return u.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    P, S, batch, _, E = u.shape
    dinitial_state = A.new_empty(P, S, batch, A.shape[-1], E, dtype=torch.float32).transpose(-1, -2)
    return (*(like(t) for t in (u, dt, A, B, C, D, z, dt_bias)), dinitial_state)


def _save_for_backward(ctx, inputs, output):
    *tensors, initial_state, starts, ctx.softplus, ctx.reverse, ctx.chunk = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, starts, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_state, _dstates, _dsum_dt):
    *tensors, starts, states, sum_dt = ctx.saved_tensors
    if dy is None:
        u, z = tensors[0], tensors[6]
        dy = torch.zeros_like(u[0] if z is None else z, dtype=u.dtype)
    *gradients, dinitial_state = scan_backward(
        dy, dfinal_state, *tensors, starts, states, sum_dt, ctx.softplus, ctx.reverse, ctx.chunk
    )
    gradients = [None if t is None else g for t, g in zip(tensors, gradients, strict=True)]
    dinitial_state = None if ctx.initial_dtype is None else dinitial_state.to(ctx.initial_dtype)
    return *gradients, dinitial_state, None, None, None, None


scan_forward.register_autograd(_backward, setup_context=_save_for_backward)


def chunk_length(u: Tensor) -> int:
    _, streams, batch, length, channels = u.shape
    return tokens_per_program(streams * batch, length, channels, u.device)
