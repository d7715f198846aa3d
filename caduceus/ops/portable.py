"""The ops in plain torch, for the code in exports: for any device, without compiling, for whole sequences.

Names and operands are those of `caduceus.ops`; `backend` has no effect. Packed sequences, and sequences that ranks
share, are refused: these need the package. The scan works on several pieces of a sequence at the same time: it takes
about √(8 L) steps for L positions, instead of L, with the same products in another order.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from caduceus.ops.across_ranks import Context, Strands
from caduceus.ops.directions import conv_by_direction, scan_by_direction
from caduceus.ops.naive import add_norm as naive_add_norm
from caduceus.ops.naive import causal_conv1d as naive_conv
from caduceus.ops.naive import head_cross_entropy as naive_head
from caduceus.ops.operands import ScanOperands

PAD_DT = -1e4
__all__ = [
    "PAD_DT",
    "Context",
    "Strands",
    "add_norm",
    "bidirectional_conv1d",
    "bidirectional_scan",
    "causal_conv1d",
    "head_cross_entropy",
    "kernels_of_gpu",
    "selective_scan",
]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    softplus: bool = True,
    reverse: bool = False,
    context: Context | None = None,
    starts: Tensor | None = None,
    keep: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y (B, L, E) of `caduceus.ops.selective_scan`."""
    _refuse(context, starts)
    return _scan(ScanOperands(u, dt, A, B, C, D, z, dt_bias), softplus, reverse, None)[0]


def bidirectional_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    context: Context | None = None,
    starts: Tensor | None = None,
    keep: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y (S, B, L, E) of `caduceus.ops.bidirectional_scan`."""
    _refuse(context, starts)
    return scan_by_direction(_scan, ScanOperands(u, dt, A, B, C, D, z, dt_bias))[0]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    reverse: bool = False,
    context: Context | None = None,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(B, L, E) of `caduceus.ops.causal_conv1d`."""
    _refuse(context, starts)
    return naive_conv(x, weight, bias, activation, reverse)


def bidirectional_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    context: Context | None = None,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(P, S, B, L, E) of `caduceus.ops.bidirectional_conv1d`."""
    _refuse(context, starts)
    return conv_by_direction(naive_conv, x, weight, bias)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Norm and sum of `caduceus.ops.add_norm`."""
    return naive_add_norm(x, residual, weight, bias, eps, out_dtype or x.dtype)


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None = None,
    *,
    ignore_label: int,
    strands: Strands | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sums of `caduceus.ops.head_cross_entropy`."""
    return naive_head(hidden, weight, labels, loss_weights, ignore_label)


def kernels_of_gpu(backend: str, tensor: Tensor) -> None:
    """None, as there are no kernels here."""


def _refuse(context: Context | None, starts: Tensor | None) -> None:
    if context is not None or starts is not None:
        raise ValueError(
            "packed or shared sequences need the package caduceus; the code of an export does not support them"
        )


@torch.compiler.disable  # a compiled graph would contain every step
def _scan(operands: ScanOperands, softplus: bool, reverse: bool, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Like `naive.selective_scan`, with the same arguments."""
    u, dt, A, B, C, D, z, dt_bias = operands
    compute, length = torch.promote_types(u.dtype, torch.float32), u.shape[1]
    steps = dt.to(compute) if dt_bias is None else dt.to(compute) + dt_bias.to(compute)
    steps = F.softplus(steps) if softplus else steps
    inputs = u.to(compute)
    state = u.new_zeros(u.shape[0], *A.shape, dtype=compute) if initial_state is None else initial_state.to(compute)
    if length == 0:
        return u, state
    size = max(1, round(math.sqrt(length / 2)))
    # Positions that fill the last piece have steps of 0, which do not change a state.
    pieces = [F.pad(t, (0, 0, 0, -length % size)).unflatten(1, (-1, size)) for t in (steps, inputs, B, C)]
    inside = (*(piece.to(compute) for piece in pieces), A.to(compute), state, reverse)
    if torch.is_grad_enabled():  # otherwise every step would keep its state for the backward pass
        y, state = checkpoint(_scan_pieces, *inside, use_reentrant=False)
    else:
        y, state = _scan_pieces(*inside)
    y = y.flatten(1, 2)[:, :length]
    if D is not None:
        y = y + D.to(compute) * inputs
    if z is not None:
        y = y * F.silu(z.to(compute))
    return y.to(u.dtype), state


def _scan_pieces(
    steps: Tensor, inputs: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """y (B, pieces, size, E) and the last state; steps, inputs (B, pieces, size, E), B, C (B, pieces, size, N)."""
    by_place = [tensor.unbind(2) for tensor in (steps, inputs, B, C)]
    places = _order(len(by_place[0]), reverse)

    def advance(states: Tensor, place: int) -> Tensor:
        """The states (B, pieces, E, N) after one more position of every piece."""
        dt, u, b = (tensors[place] for tensors in by_place[:3])
        return torch.exp(dt[..., None] * A) * states + (dt * u)[..., None] * b[..., None, :]

    ends = torch.zeros_like(state)[:, None].expand(-1, steps.shape[1], -1, -1)
    for place in places:
        ends = advance(ends, place)
    decays = torch.exp(steps.sum(2)[..., None] * A)
    entering = [state] * steps.shape[1]
    for piece in _order(steps.shape[1], reverse):
        entering[piece] = state
        state = decays[:, piece] * state + ends[:, piece]
    states, outputs = torch.stack(entering, 1), [state] * len(by_place[0])
    for place in places:
        states = advance(states, place)
        outputs[place] = torch.einsum("bpen,bpn->bpe", states, by_place[3][place])
    return torch.stack(outputs, 2), state


def _order(count: int, reverse: bool) -> Iterable[int]:
    return list(reversed(range(count))) if reverse else list(range(count))
