"""Runs both directions of every stream with an op for one direction of one stream, one run after another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from caduceus.ops.operands import ScanOperands


def runs_backwards(direction: int, stream: int, reverse: bool = False) -> bool:
    """Whether a run goes right-to-left: odd streams, such as the other strand, have the directions exchanged."""
    return ((direction + stream) % 2 == 1) != reverse


def scan_by_direction(
    scan: Callable[..., tuple[Tensor, Tensor]],
    operands: ScanOperands,
    softplus: bool = True,
    reverse: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (S, B, L, E), final states (P, S, B, E, N)), computed with a backend's `selective_scan`.

    The operands are those of `caduceus.ops.bidirectional_scan`; initial_state (P, S, B, E, N).
    """
    u, dt, A, B, C, D, z, dt_bias = operands
    directions, streams = u.shape[:2]
    u, dt, B, C, initial_state = (_unbound(t, directions, streams) for t in (u, dt, B, C, initial_state))
    A, D, dt_bias = (_unbound(t, directions) for t in (A, D, dt_bias))
    z = _unbound(z, streams)
    outputs, states = [], []
    for s in range(streams):
        y, final = zip(
            *(
                scan(
                    ScanOperands(u[d][s], dt[d][s], A[d], B[d][s], C[d][s], D[d], z[s], dt_bias[d]),
                    softplus,
                    runs_backwards(d, s, reverse),
                    initial_state[d][s],
                )
                for d in range(directions)
            ),
            strict=True,
        )
        outputs.append(y[0] + y[1] if len(y) == 2 else y[0])
        states.append(torch.stack(final))
    return torch.stack(outputs), torch.stack(states, dim=1)


def conv_by_direction(convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(P, S, B, L, E), computed with a backend's `causal_conv1d` with silu; the operands are those of
    `caduceus.ops.bidirectional_conv1d`.
    """
    directions, streams = weight.shape[0], x.shape[0]
    x, weight, bias = _unbound(x, streams), _unbound(weight, directions), _unbound(bias, directions)
    rows = [
        convolve(x[s], weight[d], bias[d], "silu", runs_backwards(d, s))
        for d in range(directions)
        for s in range(streams)
    ]
    return torch.stack(rows).unflatten(0, (directions, streams))


def _unbound(tensor: Tensor | None, *axes: int) -> Sequence[Any]:
    """A tensor's parts along its first axes, as nested lists; Nones where there is no tensor.

    The gradients of all parts are stacked to one tensor; with indexing each would be a tensor of the full size.
    """
    if not axes:
        return tensor
    parts = [None] * axes[0] if tensor is None else tensor.unbind(0)
    return [_unbound(part, *axes[1:]) for part in parts]
