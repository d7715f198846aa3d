"""Both directions of every stream with an op that takes one direction of one stream: one run after another."""

from collections.abc import Callable

import torch
from torch import Tensor


def runs_backwards(direction: int, stream: int, reverse: bool = False) -> bool:
    """Whether a run goes right-to-left: odd streams, as the other strand is, have the directions exchanged."""
    return ((direction + stream) % 2 == 1) != reverse


def scan_by_runs(
    scan: Callable[..., tuple[Tensor, Tensor]],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool = True,
    reverse: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (S, B, L, E), final states (P, S, B, E, N)) of a backend's `selective_scan`.

    Operands as of `caduceus.ops.bidirectional_scan`, initial_state (P, S, B, E, N).
    """
    outputs, states = [], []
    for s in range(u.shape[1]):
        y, final = zip(
            *(
                scan(
                    u[d, s],
                    dt[d, s],
                    A[d],
                    B[d, s],
                    C[d, s],
                    None if D is None else D[d],
                    None if z is None else z[s],
                    None if dt_bias is None else dt_bias[d],
                    softplus,
                    runs_backwards(d, s, reverse),
                    None if initial_state is None else initial_state[d, s],
                )
                for d in range(A.shape[0])
            ),
            strict=True,
        )
        outputs.append(y[0] + y[1] if len(y) == 2 else y[0])
        states.append(torch.stack(final))
    return torch.stack(outputs), torch.stack(states, dim=1)


def conv_by_runs(convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(P, S, B, L, E) of a backend's `causal_conv1d` with silu. Operands as of `caduceus.ops.bidirectional_conv1d`."""
    rows = [
        convolve(x[s], weight[d], None if bias is None else bias[d], "silu", runs_backwards(d, s))
        for d in range(weight.shape[0])
        for s in range(x.shape[0])
    ]
    return torch.stack(rows).unflatten(0, (weight.shape[0], x.shape[0]))
