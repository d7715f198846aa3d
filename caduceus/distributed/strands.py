"""Strand parallelism: two ranks share a sequence of Caduceus-PS, each with one of its strands; results are exact.

The streams of the strands are only combined in the logits. So the ranks exchange only the logits at labelled bases,
once per micro-batch, and nothing in the backward pass: after the logits both compute the same, and each takes half of
the loss.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, autograd


class StrandGroup:
    """The ranks that share the strands; rank 0 has the stream of the forward strand, rank 1 that of its complement."""

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self.group = group
        self.rank = rank
        self.size = size

    def sum(self, part: Tensor) -> Tensor:
        """Sum over the ranks, with the same bits on all of them.

        It is differentiable where each rank then computes an equal share of the same loss: the gradients that would
        have to be added up are then equal on all.
        """
        return _Sum.apply(part, self)


class _Sum(autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, strands: StrandGroup) -> Tensor:
        ctx.size = strands.size
        total = part.clone()
        dist.all_reduce(total, group=strands.group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None
