"""Context parallelism: the ranks of a group share a sequence, each with a contiguous slice, exactly.

The convolution needs the K - 1 bases beside the slice. The scan needs the state in which it enters the slice: every
rank runs its slice from a zero state, all gather (sum of the step sizes, end state), and each folds those of the ranks
before it. What travels does not depend on the length of the slice: per direction and stream E (N + 1) numbers a rank
for the scan and E (K - 1) for the convolution, and as many back for the gradients.

Gradients meet in a collective, so every rank's result must depend on what it gathered, also where the sequence begins.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class ContextGroup:
    """The ranks that share a sequence; rank r of R holds positions [r L, (r + 1) L)."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size

    def halo(self, x: Tensor, width: int, reverse: list[bool]) -> Tensor:
        """The `width` positions that precede each slice in its direction, zeros before the sequence begins.

        x (G, B, L, E), one direction for each of G -> (G, B, width, E) in the order of the sequence.
        """
        edges = [x[g, :, :width] if reverse[g] else x[g, :, -width:] for g in range(len(reverse))]
        edges = _AllGather.apply(torch.stack(edges), self.group)
        halos = []
        for g, backwards in enumerate(reverse):
            neighbour = self.rank + 1 if backwards else self.rank - 1
            inside = 0 <= neighbour < self.size
            halos.append(edges[neighbour % self.size, g] * inside)
        return torch.stack(halos)

    def initial_state(self, steps: Tensor, A: Tensor, end_state: Tensor, reverse: list[bool]) -> Tensor:
        """The state in which the scan enters this rank's slice, (G, B, E, N).

        steps (G, B, E): sum of the slice's step sizes, by which it multiplies a state with exp(A steps); A (G, E, N);
        end_state (G, B, E, N): where a scan of the slice ends that enters it with zero.
        """
        gathered = _AllGather.apply(torch.cat([steps[..., None], end_state], dim=-1), self.group)  # (R, G, B, E, 1 + N)
        states = []
        for g, backwards in enumerate(reverse):
            before = range(self.size - 1, self.rank, -1) if backwards else range(self.rank)
            state = 0 * gathered[self.rank, g, ..., 1:]
            for rank in before:
                decay = torch.exp(gathered[rank, g, ..., :1] * A[g])
                state = decay * state + gathered[rank, g, ..., 1:]
            states.append(state)
        return torch.stack(states)


class _AllGather(torch.autograd.Function):
    """(…) on each of R ranks -> (R, …) on all; a gradient goes back to where its part came from, summed over ranks."""

    @staticmethod
    def forward(ctx, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        own = torch.empty_like(gradient[0])
        dist.reduce_scatter(own, list(gradient.contiguous().unbind()), group=ctx.group)
        return own, None
