"""The definition of the ops, in plain PyTorch. Every fast path is tested against this file, in forward and gradient.

Shapes: B batch, L length, E inner channels, N states, K convolution width, S streams (strands: 1 or 2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t;  y_t = C_t h_t + D u_t, gated by silu(z_t)  (Gu and Dao 2023).

    Right-to-left (`reverse`) the recurrence starts at the last position. Returns y (B, L, E) in u's dtype and the
    state after the last step taken (B, E, N); the arithmetic is at least fp32.
    """
    compute = torch.promote_types(u.dtype, torch.float32)
    out_dtype = u.dtype
    u, dt, A, B, C = (t.to(compute) for t in (u, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    if softplus:
        dt = F.softplus(dt)
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(compute)
    ys: list[Tensor] = [u] * u.shape[1]
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys[t] = torch.einsum("ben,bn->be", h, C[:, t])
    y = torch.stack(ys, dim=1)
    if D is not None:
        y = y + D.to(compute) * u
    if z is not None:
        y = y * F.silu(z.to(compute))
    return y.to(out_dtype), h


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, reverse: bool) -> Tensor:
    """Depth-wise convolution over the K - 1 positions before (`reverse`: after) each one and itself.

    The last tap of `weight` (E, K) meets the position itself in both directions.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    width, length = weight.shape[1], x.shape[1]
    padded = F.pad(x.to(compute), (0, 0, 0, width - 1) if reverse else (0, 0, width - 1, 0))
    y = torch.zeros_like(x, dtype=compute)
    for k in range(width):
        start = width - 1 - k if reverse else k
        y = y + padded[:, start : start + length] * weight[:, k].to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
