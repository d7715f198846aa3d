"""The selective scan on the GPU: passes of the kernels that scan_launches.py launches, as torch ops with gradients.

Shapes: P parameter directions, S streams, B batch, L length, E inner channels, N states.
"""

import torch
import triton
from torch import Tensor

from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import scan_launches as launches
from caduceus.ops.triton.device import require_float, tokens_per_program, wide_channel_block
from caduceus.ops.triton.scan_launches import Kept, ScanKernels

MAX_STATES = 64
"""In most kernels a thread holds all states of its channel: up to 64 states fit in its registers without spilling."""


def scan_with_states(
    operands: ScanOperands,
    softplus: bool = True,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    reverse: bool = False,
    chunk: int | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y (S, B, L, E), final states (P, S, B, E, N)), both differentiable.

    The operands are those of `caduceus.ops.bidirectional_scan`; initial_state (P, S, B, E, N); starts as in
    `ops.packed`. With `reverse` all directions are exchanged; `chunk` is the number of tokens that one program takes.
    `keep`: values that the backward pass would recompute are kept for it; the bits are the same.
    """
    require_float(operands.u, "u")
    states = operands.A.shape[-1]
    if states > MAX_STATES:
        raise ValueError(f"A: the triton backend has up to {MAX_STATES} states, got {states}")
    if chunk is None:
        chunk = chunk_length(operands.u)
    if chunk % launches.PIECE:
        raise ValueError(f"chunk: must be a multiple of {launches.PIECE}, got {chunk}")
    y, final_state, *_ = scan_forward(*operands, initial_state, starts, softplus, reverse, chunk, keep)
    return y, final_state


def bidirectional_scan(operands: ScanOperands, starts: Tensor | None = None, keep: bool = False) -> Tensor:
    """`caduceus.ops.bidirectional_scan`."""
    return scan_with_states(operands, starts=starts, keep=keep)[0]


def selective_scan(
    operands: ScanOperands,
    softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
    starts: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y (B, L, E), final state (B, E, N)) of `caduceus.ops.selective_scan`."""
    y, final_state = scan_with_states(
        operands.unsqueezed(),
        softplus,
        None if initial_state is None else initial_state[None, None],
        starts,
        reverse,
        keep=keep,
    )
    return y.squeeze(0), final_state.squeeze((0, 1))


def launch_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    softplus: bool,
    reverse: bool,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, final states, state before each chunk (rows, chunks, N, E), sum of dt over each (rows, chunks, E), and the
    two of `Kept`, empty unless `keep`)."""
    operands = ScanOperands(u, dt, A, B, C, D, z, dt_bias)
    scan = ScanKernels(operands, starts, softplus, reverse, chunk)
    states, sum_dt = scan.chunk_states()
    final_state = scan.carry(states, sum_dt, initial_state, descending=False)
    if keep:
        y, kept = scan.outputs_and_kept(states)
    else:
        y, kept = scan.outputs(states), Kept(*(states.new_empty(0) for _ in range(2)))
    return y, final_state, states, sum_dt, *kept


def launch_backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    starts: Tensor | None,
    states: Tensor,
    sum_dt: Tensor,
    kept_states: Tensor,
    kept_outputs: Tensor,
    softplus: bool,
    reverse: bool,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias, initial_state; empty for operands that are not given."""
    operands = ScanOperands(u, dt, A, B, C, D, z, dt_bias)
    scan = ScanKernels(operands, starts, softplus, reverse, chunk)
    before = Kept(kept_states, kept_outputs) if keep else None
    adjoints, dz = scan.adjoints(dy, before)
    dinitial_state = scan.carry(adjoints, sum_dt, dfinal_state, descending=True)
    return (*scan.gradients(dy, states, adjoints, before, dz), dinitial_state)


scan_forward = torch.library.custom_op("caduceus::triton_scan_forward", launch_forward, mutates_args=())


@scan_forward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, initial_state, starts, softplus, reverse, chunk, keep):
    P, S, batch, length, E = u.shape
    rows, chunks, N = P * S * batch, -(-length // chunk), A.shape[-1]
    states = (P, S * batch * chunks, chunk // launches.PIECE, N, E) if keep else (0,)
    outputs = (S, batch, length, E) if keep and z is not None else (0,)
    return (
        u.new_empty(S, batch, length, E),
        A.new_empty(P, S, batch, N, E, dtype=torch.float32).transpose(-1, -2),
        A.new_empty(rows, chunks, N, E, dtype=torch.float32),
        A.new_empty(rows, chunks, E, dtype=torch.float32),
        A.new_empty(states, dtype=torch.float32),
        A.new_empty(outputs, dtype=torch.float32),
    )


scan_backward = torch.library.custom_op("caduceus::triton_scan_backward", launch_backward, mutates_args=())


@scan_backward.register_fake
def _(dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, starts, states, sum_dt, kept_states, kept_outputs, *_):
    def like(tensor: Tensor | None) -> Tensor:
        return u.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    P, S, batch, _, E = u.shape
    dinitial_state = A.new_empty(P, S, batch, A.shape[-1], E, dtype=torch.float32).transpose(-1, -2)
    return (*(like(t) for t in (u, dt, A, B, C, D, z, dt_bias)), dinitial_state)


def _save_for_backward(ctx, inputs, output):
    *tensors, initial_state, starts, ctx.softplus, ctx.reverse, ctx.chunk, ctx.keep = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, starts, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_state, *_):
    *tensors, starts, states, sum_dt, kept_states, kept_outputs = ctx.saved_tensors
    if dy is None:
        u, z = tensors[0], tensors[6]
        dy = torch.zeros_like(u[0] if z is None else z, dtype=u.dtype)
    found = (states, sum_dt, kept_states, kept_outputs)
    *gradients, dinitial_state = scan_backward(
        dy, dfinal_state, *tensors, starts, *found, ctx.softplus, ctx.reverse, ctx.chunk, ctx.keep
    )
    gradients = [None if t is None else g for t, g in zip(tensors, gradients, strict=True)]
    dinitial_state = None if ctx.initial_dtype is None else dinitial_state.to(ctx.initial_dtype)
    return *gradients, dinitial_state, *(None,) * 5


scan_forward.register_autograd(_backward, setup_context=_save_for_backward)


def chunk_length(u: Tensor) -> int:
    """Tokens of a chunk that suit the kernels which take all directions of one in a program: they have the fewest."""
    _, streams, batch, length, channels = u.shape
    programs = triton.cdiv(channels, wide_channel_block(u))
    return tokens_per_program(streams * batch, length, programs, launches.RESIDENT, u.device)
