"""Ops over ranks that share a sequence, exactly: scan and convolution of slices of it, and what strands need.

The convolution needs the K - 1 inputs beside a slice. The scan needs the state in which it enters the slice, and its
gradient the adjoint that comes back from the slices after it. Every rank runs its slice from zero, all gather where
that ends, each folds what the slices before it (on the way back: after it) do to a state, and then runs its slice for
real. A slice multiplies a state by exp(A dt_1) exp(A dt_2) … = exp(A sum dt), so what is gathered does not depend on
its length. Strands on ranks of their own meet in the logits alone.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from caduceus.ops.runs import runs_backwards


class Context(Protocol):
    """What the ops need of a group of ranks that share a sequence (see `caduceus.distributed.context`)."""

    rank: int
    size: int

    def halo(self, runs: list[Tensor], width: int, reverse: list[bool]) -> Tensor:
        """The `width` positions that precede each run's slice in its direction, differentiable.

        runs: G of (B, L, E) -> (G, B, width, E).
        """

    def all_gather(self, part: Tensor) -> Tensor:
        """(…) of each rank -> (R, …) on all of them, outside of autograd."""


class Strands(Protocol):
    """What head and model need of two ranks with a stream each (see `caduceus.distributed.strands`)."""

    rank: int
    """The stream that is here."""
    size: int

    def sum(self, part: Tensor) -> Tensor:
        """Sum over the ranks, differentiable where each goes on to an equal share of one loss."""


class SlicedScan(Protocol):
    """A backend's scan of one slice, taken in two passes either way; none of them is part of an autograd graph.

    Made of the operands of `caduceus.ops.bidirectional_scan` with `softplus` and `reverse`, which exchanges all
    directions. A state is (P, S, B, E, N).
    """

    def __init__(self, *operands: Any) -> None: ...

    def end_state(self) -> tuple[Tensor, Tensor]:
        """The state in which a scan from zero ends, and the sum of the step sizes (P, S, B, E)."""

    def outputs(self, initial_state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y (S, B, L, E), and what is to be kept for the way back."""

    def initial_gradient(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """Gradient of the initial state by the slice's own outputs."""

    def gradients(self, dy: Tensor, final_gradient: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of the eight operands, given also that of the final state."""


@torch.compiler.disable  # exchanges are not for a compiled graph; what lies between them is
def scan_over_ranks(
    sliced: type[SlicedScan],
    operands: tuple[Tensor | None, ...],
    softplus: bool,
    reverse: bool,
    context: Context,
) -> Tensor:
    """y (S, B, L, E) of this rank's slice. `operands` as of `caduceus.ops.bidirectional_scan`."""
    return _ScanOverRanks.apply(sliced, softplus, reverse, context, *operands)


class _ScanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sliced, softplus, reverse, context, *operands):
        scan = sliced(*operands, softplus, reverse)
        state, steps = scan.end_state()
        gathered = context.all_gather(torch.cat([steps[..., None], state], dim=-1))
        steps, states = gathered[..., 0].contiguous(), gathered[..., 1:]
        y, kept = scan.outputs(carried(states, steps, operands[2], context, reverse))
        ctx.save_for_backward(*operands, steps, *kept)
        ctx.sliced, ctx.softplus, ctx.reverse, ctx.context = sliced, softplus, reverse, context
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # to be asked for once: recomputed activations are unpacked then
        operands, steps, kept = saved[:8], saved[8], saved[9:]
        scan = ctx.sliced(*operands, ctx.softplus, ctx.reverse)
        adjoints = ctx.context.all_gather(scan.initial_gradient(dy, kept))
        final = carried(adjoints, steps, operands[2], ctx.context, not ctx.reverse)
        return None, None, None, None, *scan.gradients(dy, final, kept)


def carried(ends: Tensor, steps: Tensor, A: Tensor, context: Context, reverse: bool) -> Tensor:
    """What enters this rank's slice in each run's direction; `ends` (R, P, S, B, E, N) is what slices reach from zero.

    steps (R, P, S, B, E); A (P, E, N). Adjoints go against the direction, hence with `reverse` inverted.
    """
    carried = torch.zeros_like(ends[0])
    for d in range(ends.shape[1]):
        for s in range(ends.shape[2]):
            backwards = runs_backwards(d, s, reverse)
            for rank in range(context.size - 1, context.rank, -1) if backwards else range(context.rank):
                decay = torch.exp(steps[rank, d, s, ..., None] * A[d])
                carried[d, s] = decay * carried[d, s] + ends[rank, d, s]
    return carried


def conv_over_ranks(
    convolve: Callable[..., Tensor],
    x: Tensor,
    directions: int,
    width: int,
    reverse: bool,
    takes_halo: bool,
    context: Context,
) -> Tensor:
    """`convolve` of x (S, B, L, E), over the slice's borders -> (P, S, B, L, E).

    A backend that takes the halos (P, S, B, width, E) as an argument is given them; others convolve a longer slice.
    """
    streams, length = x.shape[0], x.shape[2]
    backwards = [runs_backwards(d, s, reverse) for d in range(directions) for s in range(streams)]
    halos = context.halo(list(x.unbind(0)) * directions, width, backwards)
    halos = halos.unflatten(0, (directions, streams))
    if takes_halo:
        return convolve(x, halo=halos)
    sides = [[torch.zeros_like(halos[0, s]) for s in range(streams)] for _ in range(2)]
    for run, back in enumerate(backwards):
        sides[back][run % streams] = halos.flatten(0, 1)[run]
    before, after = (torch.stack(side) for side in sides)
    return convolve(torch.cat([before, x, after], dim=2)).narrow(3, width, length)
