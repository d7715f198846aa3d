"""Context parallelism: the ranks of a group share a sequence, each with a contiguous slice; results are exact.

`caduceus.ops.across_ranks` describes what they exchange: per layer, direction and stream of a sequence, a rank sends E
(N + 1) numbers for the scan, and in the backward pass E N. For the convolution it sends, per stream, 2 E (K - 1), and
in the backward pass 2 R E (K - 1). None of these depends on the length of the slice. ¶ The gradients of the edges are
exchanged in a collective, so every rank's result must depend on its neighbours' edges, also where the sequence begins.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caduceus.distributed.groups import gather, sum_to_owners


class ContextGroup:
    """The ranks that share a sequence; rank r of R holds positions [r L, (r + 1) L)."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size

    @torch.compiler.disable  # exchanges cannot be in a compiled graph
    def edges(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The `width` positions before and after this rank's slice, with zeros outside the sequence.

        x (S, B, L, E) -> twice (S, B, width, E).
        """
        return _Edges.apply(x, width, self)

    def all_gather(self, part: Tensor) -> Tensor:
        """A tensor (…) of each rank -> (R, …) on all of them, without autograd."""
        return gather(part, self.group)


class _Edges(torch.autograd.Function):
    """Every rank sends its first and last positions to all; gradients go back to the ranks that sent the positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, context: ContextGroup) -> tuple[Tensor, Tensor]:
        ctx.shape, ctx.context = x.shape, context
        first_and_last = gather(torch.stack([x[:, :, :width], x[:, :, -width:]]), context.group)
        nothing = torch.zeros_like(first_and_last[0, 0])
        before = first_and_last[context.rank - 1, 1] if context.rank > 0 else nothing
        after = first_and_last[context.rank + 1, 0] if context.rank + 1 < context.size else nothing
        return before.clone(), after.clone()

    @staticmethod
    def backward(ctx: Any, before: Tensor, after: Tensor) -> tuple[Tensor, None, None]:
        context, width = ctx.context, before.shape[2]
        parts = before.new_zeros(context.size, 2, *before.shape)
        if context.rank > 0:
            parts[context.rank - 1, 1] = before
        if context.rank + 1 < context.size:
            parts[context.rank + 1, 0] = after
        first, last = sum_to_owners(parts, context.group)
        gradient = before.new_zeros(ctx.shape)
        gradient[:, :, :width] = first
        gradient[:, :, -width:] += last  # in a short slice they overlap
        return gradient, None, None
