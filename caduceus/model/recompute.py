"""Recomputes the operands of a function in the backward pass instead of keeping them, without running the function
again.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def with_operands_made_again(make: Callable[[], tuple[Tensor, ...]], use: Callable[..., Tensor]) -> Tensor:
    """`use(*make())`, where autograd keeps nothing that `make` computes, and the backward pass calls `make` again.

    `use` is not called again, and what autograd keeps of it besides its operands stays. Gradients have the same bits if
    `make` gives the same bits again, so it must not draw random numbers. Where it exchanges tensors with other ranks,
    it does so once more in the backward pass, in the same order on all ranks. It cannot be in a compiled graph.
    """
    operands = _OperandsMadeAgain(make)
    with saved_tensors_hooks(operands.pack_inside, operands.unpack):
        made = make()
    operands.made(made)
    with saved_tensors_hooks(operands.pack_outside, operands.unpack):
        return use(*made)


class _OperandsMadeAgain:
    """Replaces the tensors that autograd saves of `make`, and of its results, by numbers, until the backward pass asks
    for one.
    """

    def __init__(self, make: Callable[[], tuple[Tensor, ...]]) -> None:
        self.make = make
        self.numbers = itertools.count()
        self.inside: list[int] = []
        """Numbers of the tensors that `make` saves, in the order in which it saves them."""
        self.outside: dict[int, tuple[int, tuple[int, ...], tuple[int, ...], int]] = {}
        """For each saved tensor that is one of its results: the number of the result, and the view of its storage."""
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
            raise RuntimeError("recomputed operands have no backward pass of their own")

        with (
            torch.enable_grad(),  # without it nothing is saved
            self.autocast,
            saved_tensors_hooks(lambda tensor: saved.append(tensor.detach()), unusable),
        ):
            results = self.make()
        self.values = dict(zip(self.inside, saved, strict=True))
        for number, (result, *view) in self.outside.items():
            self.values[number] = results[result].detach().as_strided(*view)
