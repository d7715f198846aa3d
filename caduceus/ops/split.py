"""Scan and convolution where the sequence is cut into slices over the ranks of a context group.

A context group gives two things (see `caduceus.distributed.context`): `halo`, the inputs beside a slice, and
`initial_state`, the state in which a scan enters it. Both are differentiable, so gradients cross ranks by themselves.
A run is one direction of one stream; the G runs of a call share one exchange.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Context(Protocol):
    """What the ops need of a group of ranks that share a sequence."""

    def halo(self, x: Tensor, width: int, reverse: list[bool]) -> Tensor:
        """The `width` positions that precede each run's slice in its direction. x (G, B, L, E)."""

    def initial_state(self, steps: Tensor, A: Tensor, end_state: Tensor, reverse: list[bool]) -> Tensor:
        """The state (G, B, E, N) that enters each run's slice, from what slices do to a state.

        steps (G, B, E), the sum of a slice's dt, stands for its decay: exp(A dt_1) exp(A dt_2) … = exp(A sum dt).
        """


def split_conv1d(
    convolve: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reverse: list[bool],
    context: Context,
) -> Tensor:
    """x (G, B, L, E), weight (G, E, K), bias (G, E) -> (G, B, L, E).

    `convolve(x, weight, bias, reverse)` is the convolution of one run.
    """
    length, width = x.shape[2], weight.shape[2] - 1
    halos = context.halo(x, width, reverse)
    outputs = []
    for g, backwards in enumerate(reverse):
        extended = torch.cat([x[g], halos[g]] if backwards else [halos[g], x[g]], dim=1)
        y = convolve(extended, weight[g], None if bias is None else bias[g], backwards)
        outputs.append(y.narrow(1, 0 if backwards else width, length))
    return torch.stack(outputs)


def split_initial_states(
    scan: Callable[..., tuple[Tensor, Tensor]],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    softplus: bool,
    reverse: list[bool],
    context: Context,
) -> Tensor:
    """The state (G, B, E, N) in which each run enters this rank's slice.

    u, dt (G, B, L, E); A (G, E, N); B, C (G, B, L, N); dt_bias (G, E). `scan(u, dt, A, B, C, dt_bias, reverse)` is one
    run's scan from a zero state, with its end state.
    """
    steps = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias is not None:
        steps = steps + dt_bias[:, None, None]
    if softplus:
        steps = F.softplus(steps)
    runs = enumerate(reverse)
    ends = [scan(u[g], dt[g], A[g], B[g], C[g], None if dt_bias is None else dt_bias[g], back)[1] for g, back in runs]
    return context.initial_state(steps.sum(2), A, torch.stack(ends), reverse)
