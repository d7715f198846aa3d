"""Whether an op gives what it tells a compiler, which plans memory by that: shapes, types and strides of outputs."""

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

KEPT = {"states", "sum_dt", "kept_states", "kept_outputs", "kept"}
"""Operands of backward ops that forward ops made, and that keep their layout."""


class AsTold(TorchDispatchMode):
    """Compares each of this package's ops that is called with its fake implementation, with tensors as they are and
    with none of them contiguous.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        if op.namespace != "caduceus":
            return found
        self.called.add(op.name())
        assert not kwargs
        _compare(op, args, found)
        layouts = cycle((_spread, _sliced))
        others = tuple(
            next(layouts)(arg) if isinstance(arg, Tensor) and described.name not in KEPT else arg
            for arg, described in zip(args, op._schema.arguments, strict=True)
        )
        again = op(*others)
        _compare(op, others, again)
        # NaN is in what no one reads.
        torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{op}: {m}")
        return found


def registered(prefix: str) -> set[str]:
    """The names of this package's ops that begin so."""
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"caduceus::{prefix}")}


def _compare(op: Callable, args: tuple, found: Tensor | tuple[Tensor, ...]) -> None:
    with FakeTensorMode() as mode:
        told = op(*tree_map_only(Tensor, mode.from_tensor, args))
    for i, (real, fake) in enumerate(zip(tree_leaves(found), tree_leaves(told), strict=True)):
        assert _layout(real) == _layout(fake), f"output {i} of {op} (what it is, and what the compiler was told)"


def _layout(tensor: Tensor) -> tuple:
    """Strides only where there is a step to take."""
    strides = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return tensor.dtype, tensor.shape, strides, tensor.storage_offset()


def _spread(tensor: Tensor) -> Tensor:
    """Every second number of a storage, from its second on."""
    return torch.stack([tensor, tensor], -1).select(-1, 1)


def _sliced(tensor: Tensor) -> Tensor:
    """Parts of longer rows, as a projection that gives several operands makes them."""
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
