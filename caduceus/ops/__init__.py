"""Direction-aware selective scan and causal convolution, each with interchangeable backends.

Shapes: B batch, L length, E inner channels, N states, K convolution width, S streams, such as strands. Direction d
runs left-to-right (0) or right-to-left (1); direction is an argument, never a flipped copy.

Operands of other shapes, types or devices than stated raise `ValueError` or `TypeError`. All backends but `naive` give
only first derivatives: a second one raises `RuntimeError`. An empty sequence (L = 0) has empty results.
"""

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from caduceus.errors import UserError
from caduceus.ops import naive
from caduceus.ops.across_ranks import Context, SlicedScan, Strands, conv_over_ranks, scan_over_ranks
from caduceus.ops.backends import is_triton, load_module
from caduceus.ops.directions import conv_by_direction, scan_by_direction
from caduceus.ops.mamba2 import bidirectional_ssd_scan as bidirectional_ssd_scan
from caduceus.ops.mamba2 import gated_norm as gated_norm
from caduceus.ops.operands import ScanOperands, check_conv, check_head, check_norm, check_scan
from caduceus.ops.packed import run_apart

PAD_DT = -1e4
"""`dt` before softplus at padding: softplus makes it exactly 0, so that padding neither decays a state nor adds to it.
"""


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
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    context: Context | None = None,
    starts: Tensor | None = None,
    keep: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan (Gu and Dao 2023, arXiv:2312.00752) in one direction.

    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t;  y_t = (C_t h_t + D u_t) · silu(z_t), dt after bias and softplus.

    u, dt, z (B, L, E); A (E, N), negative; B, C (B, L, N); D, dt_bias (E,); initial_state (B, E, N). Returns y (B, L,
    E), and with `return_final_state` also the state (B, E, N) after the last step, which is differentiable. With
    `reverse` the first step is at position L - 1. With a `context` its ranks share the sequence: L is this rank's
    slice, and the states come from and go to the neighbours. `starts` (B, L) bool marks the first positions of packed
    sequences: no state crosses one. Neither goes with an initial or a final state. `keep`: as in `bidirectional_scan`.
    """
    operands = ScanOperands(u, dt, A, B, C, D, z, dt_bias)
    check_scan(operands, initial_state, starts)
    module = load_module(backend, u)
    has_states = initial_state is not None or return_final_state
    if starts is not None:
        _refuse_context(context)
        if has_states:
            raise ValueError("starts: packed sequences have no initial_state and no final one")
        if is_triton(module):
            return module.selective_scan(operands, softplus, reverse, None, starts, keep)[0]

        def scan_alone(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> Tensor:
            return module.selective_scan(ScanOperands(u, dt, A, B, C, D, z, dt_bias), softplus, reverse, None)[0]

        return run_apart(starts, scan_alone, u, dt, B, C, z)
    if context is not None:
        if has_states:
            raise ValueError("a context passes the states between ranks, so there is no initial_state and no final one")
        return scan_over_ranks(_sliced_scan(module), operands.unsqueezed(), softplus, reverse, context).squeeze(0)
    kept = {"keep": keep} if is_triton(module) else {}
    y, state = module.selective_scan(operands, softplus, reverse, initial_state, **kept)
    return (y, state) if return_final_state else y


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
    """Depth-wise causal convolution with optional silu. x (B, L, E), weight (E, K), bias (E,) -> (B, L, E).

    With `reverse`, position t sees t … t + K - 1. In both directions the last tap is for the position itself. With a
    `context` its ranks share the sequence. `starts` (B, L) bool marks the first positions of packed sequences: no tap
    crosses one.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation: choose None or 'silu', got {activation!r}")
    check_conv(x, weight, bias, starts)
    module = load_module(backend, x)
    if starts is not None:
        _refuse_context(context)
        if is_triton(module):
            return module.causal_conv1d(x, weight, bias, activation, reverse, starts)
        return run_apart(starts, lambda x: module.causal_conv1d(x, weight, bias, activation, reverse), x)
    if context is None:
        return module.causal_conv1d(x, weight, bias, activation, reverse)

    def convolve(x: Tensor) -> Tensor:
        return module.causal_conv1d(x[0], weight, bias, activation, reverse)[None, None]

    return conv_over_ranks(convolve, x[None], 1, weight.shape[1] - 1, reverse, False, context).squeeze((0, 1))


def bidirectional_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    context: Context | None = None,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal convolution with silu of every stream in both directions.

    x (S, B, L, E), weight (P, E, K), bias (P, E): one filter per parameter direction d, P = 2 (1 for a uni-directional
    model). Stream s runs parameter direction d right-to-left where d + s is odd: odd streams, such as the other strand,
    have the directions exchanged. Returns (P, S, B, L, E). With a `context` its ranks share the sequence. `starts` (B,
    L) bool marks the first positions of packed sequences: no tap crosses one.
    """
    check_conv(x, weight, bias, starts, parameters="P", streams="S")
    module = load_module(backend, x)
    if starts is not None:
        _refuse_context(context)
        if is_triton(module):
            return module.bidirectional_conv1d(x, weight, bias, starts)
        return run_apart(starts, partial(bidirectional_conv1d, weight=weight, bias=bias, backend=backend), x)
    if hasattr(module, "bidirectional_conv1d"):
        convolve = partial(module.bidirectional_conv1d, weight=weight, bias=bias)
    else:
        convolve = partial(conv_by_direction, module.causal_conv1d, weight=weight, bias=bias)
    if context is None:
        return convolve(x)
    return conv_over_ranks(convolve, x, weight.shape[0], weight.shape[2] - 1, False, is_triton(module), context)


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
    """Sum over both directions of the selective scan of every stream, gated by silu(z).

    u, dt (P, S, B, L, E) and B, C (P, S, B, L, N), axis 0 the parameter direction d, P = 2 (1 for a uni-directional
    model); A (P, E, N); D, dt_bias (P, E); z (S, B, L, E). Stream s runs parameter direction d right-to-left where d +
    s is odd: odd streams, such as the other strand, have the directions exchanged. Returns (S, B, L, E). With a
    `context` its ranks share the sequence. `starts` (B, L) bool marks the first positions of packed sequences: no state
    crosses one, in either direction. `keep`: keep every eighth state and the outputs before their gate for the backward
    pass, which triton otherwise recomputes. It has no effect on other backends, and on ranks that share a sequence.
    """
    operands = ScanOperands(u, dt, A, B, C, D, z, dt_bias)
    check_scan(operands, None, starts, parameters="P", streams="S")
    module = load_module(backend, u)
    if starts is not None:
        _refuse_context(context)
        if is_triton(module):
            return module.bidirectional_scan(operands, starts, keep)

        def scan_alone(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> Tensor:
            return bidirectional_scan(u, dt, A, B, C, D, z, dt_bias, backend=backend)

        return run_apart(starts, scan_alone, u, dt, B, C, z)
    if context is not None:
        return scan_over_ranks(_sliced_scan(module), operands, True, False, context)
    if is_triton(module):
        return module.bidirectional_scan(operands, keep=keep)
    if hasattr(module, "bidirectional_scan"):
        return module.bidirectional_scan(operands)
    return scan_by_direction(module.selective_scan, operands)[0]


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
    """(norm(residual + x), residual + x): RMSNorm, or with a `bias` LayerNorm, over the last axis in at least fp32.

    x, residual (S, B, L, D); weight, bias (D,), or (S, D) for a stream each. The norm has `out_dtype`, by default x's,
    the sum has the residual's type. Without a residual the sum is x itself.
    """
    check_norm(x, residual, weight, bias)
    add_norm = getattr(load_module(backend, x), "add_norm", naive.add_norm)
    return add_norm(x, residual, weight, bias, eps, out_dtype or x.dtype)


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
    """(sum of loss weight · cross-entropy, sum of loss weights) over the labelled tokens of each sequence, (B,) each.

    Logits are computed only at labelled tokens. hidden (S, B, L, D) and the head weight (S, V, D): streams are summed
    into the logits. labels (B, L), `ignore_label` where nothing is labelled; loss_weights (B, L), by default 1. Both
    sums are in at least fp32, and 0 where no token is labelled. With `strands`, S is 1, the other stream is on another
    rank with the same labels, and each gets half of both sums. Any other label outside 0 … V - 1 raises `ValueError` on
    a CPU, where `naive` computes the loss; on a GPU, where checking would have to wait, the loss and its gradients
    become NaN.
    """
    check_head(hidden, weight, labels, loss_weights)
    if strands is not None:
        sums = naive.head_cross_entropy(hidden, weight, labels, loss_weights, ignore_label, strands.sum)
        return sums[0] / strands.size, sums[1] / strands.size
    module = load_module(backend, hidden)
    head_cross_entropy = getattr(module, "head_cross_entropy", naive.head_cross_entropy)
    return head_cross_entropy(hidden, weight, labels, loss_weights, ignore_label)


def _sliced_scan(module: ModuleType) -> type[SlicedScan]:
    if not hasattr(module, "SlicedScan"):
        name = module.__name__.rpartition(".")[2]
        raise UserError(f"ops.backend: {name} cannot share a sequence between ranks (parallel.context); choose triton")
    return module.SlicedScan


def _refuse_context(context: Context | None) -> None:
    if context is not None:
        raise ValueError("starts: packed sequences cannot be shared between ranks (parallel.context)")
