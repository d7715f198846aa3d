"""Mamba-2's scan (Dao and Gu 2024, arXiv:2405.21060): the definition, step by step, and a form of matrix products.

With one decay per head of W channels, and B and C shared by all heads, a scan over T positions is a product with a
triangular T x T matrix. So a sequence is cut into chunks, with products within each, and a state that passes from one
chunk to the next. It is plain torch, so CPU and GPU run the same code; products are in the type of x, decays and states
in at least fp32. Direction is an argument: a run from right to left has the triangle on the other side. Where kernels
for GPUs (`caduceus.ops.triton.ssd`) take a scan, they do the same without a T x T matrix in memory.

Shapes: G runs (each with its own direction), B batch, L length, H heads, W channels of a head (headdim), N states; P
directions, S streams. E = H W inner channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from caduceus.config.model import CHUNK
from caduceus.ops.across_ranks import Context, scan_over_ranks
from caduceus.ops.backends import kernels_of_gpu
from caduceus.ops.directions import runs_backwards
from caduceus.ops.operands import ScanOperands

NORM_EPSILON = 1e-5
"""Epsilon of the gated norm, as published."""

Operands = tuple[Tensor, ...]
"""x (G, B, L, H, W), dt (G, B, L, H) before bias and softplus, A (G, H), negative, B and C (G, B, L, N), D and dt_bias
(G, H), the initial state (G, B, H, W, N)."""


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    context: Context | None = None,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t ⊗ B_t;  y_t = S_t C_t + D x_t, dt after bias and softplus, in one direction.

    x (B, L, H, W); dt (B, L, H); A, D, dt_bias (H,); B, C (B, L, N); initial_state (B, H, W, N). Returns y (B, L, H,
    W), and with `return_final_state` the state after the last step. `starts` (B, L) bool marks the first positions of
    packed sequences: no state crosses one. With a `context` its ranks share the sequence. The backend `naive` computes
    the definition, every other one the form of matrix products.
    """
    if context is not None:
        if starts is not None or initial_state is not None or return_final_state:
            raise ValueError("a context goes with neither starts nor an initial_state, and there is no final one")
        return _over_ranks(ScanOperands(x, dt, A, B, C, D, None, dt_bias).unsqueezed(), reverse, context, backend)[0, 0]
    if (kernels := _kernels(backend, x, B)) is not None:
        operands = tuple(
            tensor[None] if tensor.ndim == 1 else tensor[None, None] for tensor in (x, dt, A, B, C, D, dt_bias)
        )
        first = None if initial_state is None else initial_state[None, None]
        y, state = kernels.ssd_scan(operands, first, starts, reverse)
        return (y[0, 0], state[0, 0]) if return_final_state else y[0, 0]
    if initial_state is None:
        initial_state = _no_state(x, B.shape[-1])
    operands = tuple(tensor[None] for tensor in (x, dt, A, B, C, D, dt_bias, initial_state))
    y, state = _run(operands, [reverse], starts, backend)
    return (y[0], state[0]) if return_final_state else y[0]


def bidirectional_ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    context: Context | None = None,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y (P, S, B, L, H, W) of every stream in both directions.

    x (P, S, B, L, H, W); dt (P, S, B, L, H); A, D, dt_bias (P, H); B, C (P, S, B, L, N). Stream s runs parameter
    direction d right-to-left where d + s is odd. `context` and `starts` are those of `ssd_scan`; not both.
    """
    if context is not None:
        if starts is not None:
            raise ValueError("starts: packed sequences cannot be shared between ranks (parallel.context)")
        return _over_ranks(ScanOperands(x, dt, A, B, C, D, None, dt_bias), False, context, backend)
    if (kernels := _kernels(backend, x, B)) is not None:
        return kernels.ssd_scan((x, dt, A, B, C, D, dt_bias), None, starts, False)[0]
    operands, reverse = _as_runs((x, dt, A, B, C, D, dt_bias), False)
    y, _ = _run((*operands, _no_state(operands[0], B.shape[-1])), reverse, starts, backend)
    return y.unflatten(0, x.shape[:2])


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """Sum over directions of RMSNorm(y · silu(z)) · weight: y (P, S, B, L, E), z (S, B, L, E), weight (P, E).

    The backend `triton` has a kernel for it, every other one computes the formula.
    """
    if (kernels := kernels_of_gpu(backend, y)) is not None:
        return kernels.gated_norm(y, z, weight, NORM_EPSILON)
    return _recomputed(_gated_norm, y, z, weight)


def _gated_norm(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    compute = torch.promote_types(y.dtype, torch.float32)
    gate, total = F.silu(z.to(compute)), None
    for direction, scale in zip(y, weight, strict=True):
        gated = direction.to(compute) * gate
        normed = gated * (gated.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt() * scale.to(compute)
        total = normed if total is None else total + normed
    return total.to(y.dtype)


def _run(operands: Operands, reverse: list[bool], starts: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """y (G, B, L, H, W) in x's type and the final states (G, B, H, W, N)."""
    if backend == "naive":
        return by_steps(operands, reverse, starts)
    return _recomputed(lambda *tensors: by_chunks(tensors, reverse, starts), *operands)


def by_steps(operands: Operands, reverse: Sequence[bool], starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition."""
    runs = [_one_by_steps(tensors, back, starts) for *tensors, back in zip(*operands, reverse, strict=True)]
    outputs, states = zip(*runs, strict=True)
    return torch.stack(outputs), torch.stack(states)


def _one_by_steps(operands: Sequence[Tensor], reverse: bool, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    x, dt, A, B, C, D, dt_bias, state = operands
    compute, out_dtype = torch.promote_types(x.dtype, torch.float32), x.dtype
    x, dt, A, B, C, D, dt_bias, state = (tensor.to(compute) for tensor in (x, dt, A, B, C, D, dt_bias, state))
    steps = F.softplus(dt + dt_bias)
    borders = _borders(starts, reverse)
    outputs = [x[:, 0]] * x.shape[1] if x.shape[1] else []
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        if borders is not None:
            state = torch.where(borders[:, t, None, None, None], 0, state)
        decay, fed = torch.exp(steps[:, t] * A), steps[:, t, :, None] * x[:, t]
        state = decay[..., None, None] * state + fed[..., None] * B[:, t, None, None]
        outputs[t] = torch.einsum("bhwn,bn->bhw", state, C[:, t]) + D[:, None] * x[:, t]
    y = torch.stack(outputs, 1) if outputs else x
    return y.to(out_dtype), state


def by_chunks(
    operands: Operands, reverse: Sequence[bool], starts: Tensor | None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The form of matrix products; the result does not depend on the length of a `chunk`."""
    x, dt, A, B, C, D, dt_bias, state = operands
    compute, length = torch.promote_types(x.dtype, torch.float32), x.shape[2]
    if length == 0:
        return x, state.to(compute)
    size = min(chunk, length)
    steps = F.softplus(dt.to(compute) + dt_bias.to(compute)[:, None, None])

    def cut(tensor: Tensor) -> Tensor:
        """(G, B, L, …) -> (G, B, chunks, T, …). Positions that fill the last chunk have steps of 0, and do not change
        states.
        """
        padding = (0, 0) * (tensor.ndim - 3) + (0, -length % size)
        return F.pad(tensor, padding).unflatten(2, (-1, size))

    with torch.autocast(x.device.type, enabled=False):
        steps, xs, Bs, Cs = cut(steps), cut(x), cut(B.to(x.dtype)), cut(C.to(x.dtype))
        backwards = torch.stack([x.new_full((), back, dtype=torch.bool) for back in reverse])  # a GPU waits for no list
        backwards = backwards[:, None, None, None]
        # Sums of many steps are subtracted from each other: in fp32, short decays far into a chunk would lose digits.
        wide = compute if x.device.type == "mps" else torch.float64
        logs = (steps * A.to(compute)[:, None, None, None]).to(wide)
        logs = _along(logs, backwards[..., None])  # (G, B, chunks, T, H)
        total = torch.where(backwards, logs[:, :, :, 0], logs[:, :, :, -1])  # of the whole chunk
        fed = (xs * steps[..., None]).to(x.dtype)
        inside = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
        allowed = torch.where(backwards[..., None], inside.T, inside)  # (G, 1, 1, T, T): from the second to the first
        enters = leaves = through = None
        if starts is not None:
            borders = torch.stack([_borders(starts, back) for back in reverse])
            counts = _along(cut(borders.to(torch.int32)), backwards)
            most = counts.amax(3, keepdim=True)
            allowed = allowed & (counts[..., :, None] == counts[..., None, :])
            enters, leaves, through = counts == 0, counts == most, most.squeeze(3) == 0
        y = _within_chunks(logs, allowed, Bs, Cs, fed, compute)
        to_end = torch.exp((total[:, :, :, None] - logs).to(compute))
        decay = torch.exp(total.to(compute))
        if leaves is not None:
            to_end, decay = to_end * leaves[..., None], decay * through[..., None]
        weighted = (fed * to_end[..., None]).to(x.dtype).flatten(-2)
        ends = (weighted.mT @ Bs).to(compute).unflatten(3, xs.shape[-2:])  # (G, B, chunks, H, W, N)
        entering, final = _carry(ends, decay[..., None, None], state.to(compute), reverse)
        from_before = torch.exp(logs.to(compute))
        from_before = from_before if enters is None else from_before * enters[..., None]
        carried = (Cs @ entering.flatten(3, 4).to(x.dtype).mT).unflatten(-1, xs.shape[-2:])
        y = y + carried * from_before[..., None] + D.to(compute)[:, None, None, None, :, None] * xs
    return y.flatten(2, 3)[:, :, :length].to(x.dtype), final


def _within_chunks(logs: Tensor, allowed: Tensor, B: Tensor, C: Tensor, fed: Tensor, compute: torch.dtype) -> Tensor:
    """The contributions to positions from others of their chunk, (G, B, chunks, T, H, W)."""
    by_head = logs.movedim(-1, 3)  # (G, B, chunks, H, T)
    # Masked before exp, as values on the wrong side of the diagonal may overflow.
    between = (by_head[..., :, None] - by_head[..., None, :]).to(compute)
    decays = torch.exp(between.masked_fill(~allowed[:, :, :, None], -torch.inf))
    weights = (decays * (C @ B.mT)[:, :, :, None]).to(fed.dtype)
    return (weights @ fed.movedim(-2, 3)).movedim(3, -2)


def _carry(ends: Tensor, decay: Tensor, state: Tensor, reverse: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The states (G, B, chunks, H, W, N) that enter each chunk, and the final ones; `ends`: the chunks' final states
    from zero.
    """
    entering, finals = [], []
    for run, back in enumerate(reverse):
        now, before = state[run], [state[run]] * ends.shape[2]
        parts, decays = ends[run].unbind(1), decay[run].unbind(1)
        for number in reversed(range(len(parts))) if back else range(len(parts)):
            before[number] = now
            now = decays[number] * now + parts[number]
        entering.append(torch.stack(before, 1))
        finals.append(now)
    return torch.stack(entering), torch.stack(finals)


def _along(values: Tensor, backwards: Tensor) -> Tensor:
    """Cumulative sums of values (G, B, chunks, T, …) within each chunk, in the direction of each run."""
    return torch.where(backwards, values.flip(3).cumsum(3).flip(3), values.cumsum(3))


def _borders(starts: Tensor | None, reverse: bool) -> Tensor | None:
    """(B, L) bool: where a run enters another sequence, at its first position, or in reverse at its last."""
    if starts is None or not reverse:
        return starts
    return torch.cat([starts[:, 1:], torch.zeros_like(starts[:, :1])], 1)


def _no_state(x: Tensor, states: int) -> Tensor:
    """Zeros (…, B, H, W, N) for runs of x (…, B, L, H, W)."""
    shape = (*x.shape[:-3], *x.shape[-2:], states)
    return x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))


class SlicedSSD:
    """`across_ranks.SlicedScan` of Mamba-2: a state is (P, S, B, H, W N), and A (P, H, 1)."""

    def __init__(self, operands: ScanOperands, softplus: bool, reverse: bool) -> None:
        x, dt, A, B, C, D, _, dt_bias = operands
        self.operands, self.reverse = (x, dt, A, B, C, D, dt_bias), reverse
        self.shape = x.shape[:3] + x.shape[4:]

    def _run(self, operands: Operands, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dt, A, *others = operands
        runs, reverse = _as_runs((x, dt, A[..., 0], *others), self.reverse)
        if initial_state is None:
            initial_state = _no_state(runs[0], runs[3].shape[-1])
        else:
            initial_state = initial_state.flatten(0, 1).unflatten(-1, (x.shape[-1], -1))
        y, state = by_chunks((*runs, initial_state), reverse, None)
        return y.unflatten(0, x.shape[:2]), state.flatten(-2).unflatten(0, x.shape[:2])

    def end_state(self) -> tuple[Tensor, Tensor]:
        x, dt, *_, dt_bias = self.operands
        steps = F.softplus(dt.to(torch.promote_types(x.dtype, torch.float32)) + dt_bias[:, None, None, None])
        return self._run(self.operands, None)[1], steps.sum(3)

    def outputs(self, initial_state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._run(self.operands, initial_state)[0], (initial_state,)

    def initial_gradient(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        with torch.enable_grad():
            initial_state = kept[0].detach().requires_grad_()
            return torch.autograd.grad(self._run(self.operands, initial_state)[0], initial_state, dy)[0]

    def gradients(self, dy: Tensor, final_gradient: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in self.operands]
            found = torch.autograd.grad(self._run(tuple(leaves), *kept), leaves, (dy, final_gradient))
        return *found[:6], None, found[6]


def _over_ranks(operands: ScanOperands, reverse: bool, context: Context, backend: str) -> Tensor:
    kernels = _kernels(backend, operands.u, operands.B)
    sliced = SlicedSSD if kernels is None else kernels.SlicedSSD
    return scan_over_ranks(sliced, operands._replace(A=operands.A[..., None]), True, reverse, context)


def _kernels(backend: str, x: Tensor, B: Tensor) -> Any:
    """The module of kernels for GPUs, where they take a scan of these sizes and this type; else None."""
    kernels = None if backend == "naive" else kernels_of_gpu(backend, x)
    return kernels if kernels is not None and kernels.takes_ssd(x, B.shape[-1]) else None


def _as_runs(operands: Operands, reverse: bool) -> tuple[Operands, list[bool]]:
    """Operands (P, S, …), and parameters (P, …) once for each stream, as runs (P S, …) with their directions."""
    x, dt, A, B, C, D, dt_bias = operands
    directions, streams = x.shape[:2]
    own = [tensor.flatten(0, 1) for tensor in (x, dt, B, C)]
    shared = [tensor.repeat_interleave(streams, 0) for tensor in (A, D, dt_bias)]
    back = [runs_backwards(d, s, reverse) for d in range(directions) for s in range(streams)]
    return (own[0], own[1], shared[0], own[2], own[3], shared[1], shared[2]), back


@torch.compiler.disable  # recomputation in the backward pass cannot be in a compiled graph
def _recomputed(function: Callable[..., Any], *operands: Tensor) -> Any:
    """`function(*operands)`, for which autograd keeps only the operands: the backward pass calls it again."""
    return _Recomputed.apply(function, *operands) if torch.is_grad_enabled() else function(*operands)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *operands: Tensor) -> Any:
        ctx.function = function
        ctx.save_for_backward(*operands)
        return function(*operands)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            results = ctx.function(*leaves)
            results = results if isinstance(results, tuple) else (results,)
            found = torch.autograd.grad(results, leaves, gradients, allow_unused=True)
        return None, *found
