"""Operands of a function that the backward pass makes again instead of keeping them, while the function runs once."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def with_operands_made_again(make: Callable[[], tuple[Tensor, ...]], use: Callable[..., Tensor]) -> Tensor:
    """`use(*make())`, for which autograd keeps nothing that `make` computes: the backward pass calls `make` again.

    `use` is not called again, and what autograd keeps of it besides its operands stays. Gradients are the same bits, so
    long as `make` gives the same bits again: it draws no random numbers. Where it exchanges tensors with other ranks,
    it does so once more in the backward pass, whose order is the same on all of them. Not for a compiled graph.
    """
    operands = _OperandsMadeAgain(make)
    with saved_tensors_hooks(operands.pack_inside, operands.unpack):
        made = make()
    operands.made(made)
    with saved_tensors_hooks(operands.pack_outside, operands.unpack):
        return use(*made)


class _OperandsMadeAgain:
    """What autograd saves of `make`, and of its results, as numbers until the backward pass first asks for one."""

    def __init__(self, make: Callable[[], tuple[Tensor, ...]]) -> None:
        self.make = make
        self.numbers = itertools.count()
        self.inside: list[int] = []
        """Numbers of the tensors that `make` saves, in the order in which it saves them."""
        self.outside: dict[int, tuple[int, tuple[int, ...], tuple[int, ...], int]] = {}
        """For each saved tensor that is one of its results: which result, and the view of its storage."""
        self.results: dict[int, int] = {}
        self.values: dict[int, Tensor] = {}

    def made(self, results: tuple[Tensor, ...]) -> None:
        self.results = {tensor.untyped_storage()._cdata: number for number, tensor in enumerate(results)}
        device = results[0].device.type
        self.autocast = torch.autocast(
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )

    def pack_inside(self, tensor: Tensor) -> int:
        self.inside.append(next(self.numbers))
        return self.inside[-1]

    def pack_outside(self, tensor: Tensor) -> int | Tensor:
        result = self.results.get(tensor.untyped_storage()._cdata)
        if result is None:
            return tensor
        number = next(self.numbers)
        self.outside[number] = result, tensor.shape, tensor.stride(), tensor.storage_offset()
        return number

    def unpack(self, packed: int | Tensor) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in self.values:
            self.make_again()
        return self.values.pop(packed)  # so that each is freed after its last use; asked for again, it is made again

    def make_again(self) -> None:
        saved: list[Tensor] = []

        def unusable(_packed: None) -> Tensor:
            raise RuntimeError("operands that are made again have no backward pass of their own")

        with (
            torch.enable_grad(),  # without which nothing is saved
            self.autocast,
            saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), unusable),
        ):
            results = self.make()
        self.values = dict(zip(self.inside, saved, strict=True))
        for number, (result, *view) in self.outside.items():
            self.values[number] = results[result].detach().as_strided(*view)
