"""Ops over ranks that share a sequence: scan and convolution of slices, and sums over strands; results are exact.

The convolution needs the K - 1 inputs beside a slice. The scan needs the state that enters the slice, and its gradient
the adjoint that comes back from the slices after it. Every rank runs its slice from a zero state, and all ranks gather
the final states. Each rank then computes what the slices before it (in the backward pass: after it) do to a state, and
runs its slice again from the true state. A slice multiplies a state by exp(A dt_1) exp(A dt_2) … = exp(A sum dt), so
what is gathered does not depend on the slice's length. Strands on different ranks are only combined in the logits.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from caduceus.ops.directions import runs_backwards
from caduceus.ops.operands import ScanOperands


class Context(Protocol):
    """The interface of a group of ranks that share a sequence (see `caduceus.distributed.context`)."""

    rank: int
    size: int

    def edges(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The `width` positions before and after this rank's slice, with zeros outside the sequence; differentiable.

        x (S, B, L, E) -> twice (S, B, width, E).
        """

    def all_gather(self, part: Tensor) -> Tensor:
        """A tensor (…) of each rank -> (R, …) on all of them, without autograd."""


class Strands(Protocol):
    """The interface of two ranks with one stream each (see `caduceus.distributed.strands`)."""

    rank: int
    """The stream on this rank."""
    size: int

    def sum(self, part: Tensor) -> Tensor:
        """Sum over the ranks; differentiable where each rank then computes an equal share of the same loss."""


class SlicedScan(Protocol):
    """A backend's scan of one slice, with two passes forward and two backward, none of them part of an autograd graph.

    It is constructed from the operands of `caduceus.ops.bidirectional_scan`, with `softplus`, and `reverse`, which
    exchanges all directions. A state is (P, S, B, E, N).
    """

    def __init__(self, operands: ScanOperands, softplus: bool, reverse: bool) -> None: ...

    def end_state(self) -> tuple[Tensor, Tensor]:
        """The final state of a scan from zero, and the sum of the step sizes (P, S, B, E)."""

    def outputs(self, initial_state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y (S, B, L, E), and what must be kept for the backward pass."""

    def initial_gradient(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """Gradient of the initial state from the slice's own outputs."""

    def gradients(self, dy: Tensor, final_gradient: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of the eight operands, given those of the outputs and of the final state."""


@torch.compiler.disable  # exchanges cannot be in a compiled graph; the work between them can
def scan_over_ranks(
    sliced: type[SlicedScan], operands: ScanOperands, softplus: bool, reverse: bool, context: Context
) -> Tensor:
    """y (S, B, L, E) of this rank's slice. The operands are those of `caduceus.ops.bidirectional_scan`."""
    return _ScanOverRanks.apply(sliced, softplus, reverse, context, *operands)


class _ScanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sliced, softplus, reverse, context, *tensors):
        operands = ScanOperands(*tensors)
        scan = sliced(operands, softplus, reverse)
        state, steps = scan.end_state()
        gathered = context.all_gather(torch.cat([steps[..., None], state], dim=-1))
        steps, states = gathered[..., 0].contiguous(), gathered[..., 1:]
        y, kept = scan.outputs(carried(states, steps, operands.A, context, reverse))
        ctx.save_for_backward(*operands, steps, *kept)
        ctx.sliced, ctx.softplus, ctx.reverse, ctx.context = sliced, softplus, reverse, context
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # read only once: this unpacks recomputed activations
        operands, steps, kept = ScanOperands(*saved[:8]), saved[8], saved[9:]
        scan = ctx.sliced(operands, ctx.softplus, ctx.reverse)
        adjoints = ctx.context.all_gather(scan.initial_gradient(dy, kept))
        final = carried(adjoints, steps, operands.A, ctx.context, not ctx.reverse)
        return None, None, None, None, *scan.gradients(dy, final, kept)


def carried(ends: Tensor, steps: Tensor, A: Tensor, context: Context, reverse: bool) -> Tensor:
    """The state that enters this rank's slice in each direction; `ends` (R, P, S, B, E, N): the slices' final states
    from zero.

    steps (R, P, S, B, E); A (P, E, N). Adjoints go against the direction, so for them `reverse` is inverted. The final
    state of a slice decays by all steps of the slices between: this uses one exponential of their sum, as every small
    operation costs a kernel launch, and those of all layers would take as long as the layers.
    """
    before, between = _places(context.rank, context.size, *ends.shape[1:3], reverse, ends.dtype, ends.device)
    passed = (between * steps).sum(1)
    decay = torch.exp(passed[..., None] * A[:, None, None])
    return (before * decay * ends).sum(0)


@functools.lru_cache(maxsize=64)
def _places(
    rank: int, size: int, directions: int, streams: int, reverse: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which slices precede that of `rank` in each run, and which lie between, as ones and zeros that broadcast.

    Returns (R, P, S, 1, 1, 1) for each slice, and (R, R, P, S, 1, 1) for each slice and each other one that its final
    state passes.
    """
    order = torch.arange(size)
    earlier, between = order < rank, (order[:, None] < order) & (order < rank)
    later, between_back = order > rank, (order < order[:, None]) & (order > rank)
    backwards = _backwards(directions, streams, reverse, order.device)
    slices = torch.where(backwards, later[:, None, None], earlier[:, None, None])
    passed = torch.where(backwards, between_back[:, :, None, None], between[:, :, None, None])
    return slices[..., None, None, None].to(device, dtype), passed[..., None, None].to(device, dtype)


@functools.lru_cache(maxsize=64)
def _backwards(directions: int, streams: int, reverse: bool, device: torch.device) -> Tensor:
    """(P, S) bool: which runs go right-to-left."""
    runs = [[runs_backwards(d, s, reverse) for s in range(streams)] for d in range(directions)]
    return torch.tensor(runs, device=device)


def conv_over_ranks(
    convolve: Callable[..., Tensor],
    x: Tensor,
    directions: int,
    width: int,
    reverse: bool,
    takes_halo: bool,
    context: Context,
) -> Tensor:
    """Apply `convolve` to x (S, B, L, E) across the slice's borders -> (P, S, B, L, E).

    A backend that accepts halos (P, S, B, width, E) gets them as an argument; others convolve a longer slice.
    """
    before, after = context.edges(x, width)
    if takes_halo:
        backwards = _backwards(directions, x.shape[0], reverse, x.device)
        return convolve(x, halo=torch.where(backwards[:, :, None, None, None], after, before))
    return convolve(torch.cat([before, x, after], dim=2)).narrow(3, width, x.shape[2])
