"""Context parallelism: the ranks of a group share a sequence, each with a contiguous slice, exactly.

`caduceus.ops.split` says what they exchange: per layer, direction and stream of a sequence, a rank gives E (N + 1)
numbers for the scan and E (K - 1) for the convolution, and on the way back E N and R E (K - 1). None depends on the
length of the slice.

The gradients of the halos meet in a collective, so every rank's result must depend on its halo, also where the sequence
begins.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ContextGroup:
    """The ranks that share a sequence; rank r of R holds positions [r L, (r + 1) L)."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size

    def halo(self, runs: list[Tensor], width: int, reverse: list[bool]) -> Tensor:
        """The `width` positions that precede each run's slice in its direction, zeros before the sequence begins.

        runs: G of (B, L, E), each with its direction -> (G, B, width, E) in the order of the sequence.
        """
        edges = [x[:, :width] if back else x[:, -width:] for x, back in zip(runs, reverse, strict=True)]
        gathered = _AllGather.apply(torch.stack(edges), self.group)
        halos = []
        for g, backwards in enumerate(reverse):
            neighbour = self.rank + 1 if backwards else self.rank - 1
            inside = 0 <= neighbour < self.size
            halos.append(gathered[neighbour % self.size, g] * inside)
        return torch.stack(halos)

    def all_gather(self, part: Tensor) -> Tensor:
        """(…) of each rank -> (R, …) on all of them, outside of autograd."""
        return _gathered(part, self.group)


def _gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts)


class _AllGather(torch.autograd.Function):
    """(…) on each of R ranks -> (R, …) on all; a gradient goes back to where its part came from, summed over ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(part, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = torch.empty_like(gradient[0])
        dist.reduce_scatter(own, list(gradient.contiguous().unbind()), group=ctx.group)
        return own, None
