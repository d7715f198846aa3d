"""Low-rank adapters (LoRA, Hu et al. 2021) of the projections of a Caduceus.

A projection is one parameter that stacks the matrices of its directions. The package peft adapts `nn.Linear`, and would
treat such a stack as one of experts, whose modules it wraps under other names. Here each direction has its own adapter,
and a model whose adapters are merged is an ordinary model, which every export can hold.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ADAPTED = ("in_proj", "x_proj", "out_proj")
"""Parameters of a mixer that get an adapter: (directions, out, in)."""


class LowRank(nn.Module):
    """weight + (alpha / rank) · B A, for each direction; B is 0 at first. weight (Q, out, in)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        directions, rows, columns = weight.shape
        self.A = nn.Parameter(weight.new_empty(directions, rank, columns))
        self.B = nn.Parameter(weight.new_zeros(directions, rows, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.A.view(-1, columns), a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * torch.bmm(self.B, self.A)


def add_adapters(model: nn.Module, rank: int, alpha: float | None = None) -> None:
    """Freeze a model, and give each projection of its mixers a trainable `LowRank`.

    alpha: by default twice the rank.
    """
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ADAPTED:
            weight = getattr(block.mixer, name, None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 3:
                adapter = LowRank(weight, rank, 2 * rank if alpha is None else alpha)
                parametrize.register_parametrization(block.mixer, name, adapter)


def merge_adapters(model: nn.Module) -> None:
    """Write the adapted weights into the model, and remove the adapters."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    model.requires_grad_(True)
