"""The definition of the ops, in plain PyTorch. Every fast path is tested against this file, in forward and gradient.

Shapes: B batch, L length, E inner channels, N states, K convolution width, S streams.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from caduceus.ops.directions import scan_by_direction
from caduceus.ops.operands import ScanOperands


def selective_scan(
    operands: ScanOperands, softplus: bool, reverse: bool, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t;  y_t = C_t h_t + D u_t, gated by silu(z_t)  (Gu and Dao 2023).

    Right-to-left (`reverse`) the recurrence starts at the last position. Returns y (B, L, E) in u's dtype and the state
    after the last step (B, E, N); the arithmetic is in at least fp32.
    """
    u, dt, A, B, C, D, z, dt_bias = operands
    compute = torch.promote_types(u.dtype, torch.float32)
    out_dtype = u.dtype
    u, dt, A, B, C = (t.to(compute) for t in (u, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(compute)
    if softplus:
        dt = F.softplus(dt)
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(compute)
    ys: list[Tensor] = [u] * u.shape[1]
    # Unbound once, as with slices each gradient would be a tensor of the full length.
    steps, inputs, Bs, Cs = (tensor.unbind(1) for tensor in (dt, u, B, C))
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        h = torch.exp(steps[t][..., None] * A) * h + (steps[t] * inputs[t])[..., None] * Bs[t][:, None]
        ys[t] = torch.einsum("ben,bn->be", h, Cs[t])
    y = torch.stack(ys, dim=1) if ys else u
    if D is not None:
        y = y + D.to(compute) * u
    if z is not None:
        y = y * F.silu(z.to(compute))
    return y.to(out_dtype), h


class SlicedScan:
    """`across_ranks.SlicedScan`, computed with autograd."""

    def __init__(self, operands: ScanOperands, softplus: bool, reverse: bool) -> None:
        self.operands = operands
        self.options = (softplus, reverse)

    def end_state(self) -> tuple[Tensor, Tensor]:
        _, dt, A, *_, dt_bias = self.operands
        steps = dt.to(A.dtype) if dt_bias is None else dt + dt_bias[:, None, None, None]
        steps = F.softplus(steps) if self.options[0] else steps
        return scan_by_direction(selective_scan, self.operands, *self.options)[1], steps.sum(3)

    def outputs(self, initial_state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, _ = scan_by_direction(selective_scan, self.operands, *self.options, initial_state)
        return y, (initial_state,)

    def initial_gradient(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        (initial_state,) = kept
        with torch.enable_grad():
            initial_state = initial_state.detach().requires_grad_()
            y, _ = scan_by_direction(selective_scan, self.operands, *self.options, initial_state)
            return torch.autograd.grad(y, initial_state, dy)[0]

    def gradients(self, dy: Tensor, final_gradient: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = ScanOperands(*(None if t is None else t.detach().requires_grad_() for t in self.operands))
            outputs = scan_by_direction(selective_scan, leaves, *self.options, *kept)
            present = [leaf for leaf in leaves if leaf is not None]
            found = iter(torch.autograd.grad(outputs, present, (dy, final_gradient)))
        return tuple(None if leaf is None else next(found) for leaf in leaves)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, reverse: bool) -> Tensor:
    """Depth-wise convolution over the K - 1 positions before (`reverse`: after) each one and itself.

    In both directions the last tap of `weight` (E, K) is for the position itself.
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


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(norm(residual + x), residual + x): RMSNorm, or with a `bias` LayerNorm, over the last axis in at least fp32.

    weight, bias (D,), or (S, D) of the streams on the first axis. The sum has the residual's type.
    """
    total = x if residual is None else (residual + x).to(residual.dtype)
    compute = torch.promote_types(total.dtype, torch.float32)
    wide = total.to(compute)
    scale, offset = (
        None if t is None else t.to(compute).view(-1, *[1] * (x.ndim - 2), t.shape[-1]) for t in (weight, bias)
    )
    if offset is None:
        # vector_norm reads its input once and keeps no large tensor; F.rms_norm takes 1.5 times as long on a CPU.
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1]
        normed = wide * (mean_square + eps).rsqrt() * scale
    else:
        normed = F.layer_norm(wide, wide.shape[-1:], eps=eps) * scale + offset
    return normed.to(out_dtype), total


def head_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor | None,
    ignore_label: int,
    add_up: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> tuple[Tensor, Tensor]:
    """(sum of loss weight · cross-entropy, sum of loss weights) over the labelled tokens of each sequence, (B,) each.

    The sums are in at least fp32. The logits of a token are the sum over streams of hidden (S, B, L, D) · weight (S, V,
    D). `add_up` adds the logits of other streams to those of these, (labelled tokens, V). A label outside 0 … V - 1
    that is not `ignore_label` raises `ValueError` on a CPU; elsewhere, where checking would have to wait, the loss is
    NaN.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    places = (labels != ignore_label).nonzero(as_tuple=True)  # only once, as it waits for the GPU
    rows = hidden[(slice(None), *places)].to(compute)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.einsum("smd,svd->mv", rows, weight.to(compute))
    targets = labels[places].long()
    known = (targets >= 0) & (targets < weight.shape[1])
    if targets.device.type == "cpu" and not known.all():
        wrong = targets[~known][0].item()
        raise ValueError(f"labels: {wrong} is neither below the vocabulary's {weight.shape[1]} nor ignored")
    losses = F.cross_entropy(add_up(logits), targets.where(known, 0), reduction="none")
    losses = losses * torch.where(known, 1, torch.nan)
    weights = torch.ones_like(losses) if loss_weights is None else loss_weights[places].to(compute)
    nothing = losses.new_zeros(labels.shape)
    return nothing.index_put(places, losses * weights).sum(-1), nothing.index_put(places, weights).sum(-1)
