"""Records the collectives of this rank, in their order, as they reach torch's process groups."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "alltoall_base_": "all-to-all",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
}
"""Operators of torch by the collectives that they are."""
_OUTPUT_FIRST = ("allgather_", "_allgather_base_", "reduce_scatter_", "_reduce_scatter_base_", "gather_", "scatter_")


@dataclass(frozen=True)
class Call:
    """A collective: its kind, the ranks of its group, and the bytes that this rank gives to it."""

    kind: str
    ranks: tuple[int, ...]
    bytes: int

    def __str__(self) -> str:
        return f"{self.kind} of {self.bytes:,} bytes over {len(self.ranks)} ranks"


class Recorder(TorchDispatchMode):
    """Within, `calls` grows by every collective that tensors take part in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if DTensor in types:  # to whose own operators it comes back
            return NotImplemented
        namespace, _, name = function.name().partition("::")
        if namespace in ("c10d", "_c10d_functional") and name in KINDS:
            self.calls.append(Call(KINDS[name], _ranks_of(args, kwargs or {}), _bytes(name, args)))
        return function(*args, **(kwargs or {}))

    def count(self) -> dict[str, int]:
        """Calls by kind."""
        return {kind: sum(call.kind == kind for call in self.calls) for kind in {call.kind for call in self.calls}}

    def bytes(self) -> dict[str, int]:
        """Bytes that this rank gave, by kind."""
        return {
            kind: sum(call.bytes for call in self.calls if call.kind == kind)
            for kind in {call.kind for call in self.calls}
        }


@contextlib.contextmanager
def recording_threads() -> Iterator[list[list[Call]]]:
    """Gives the calls of this thread and of each that starts within, in the order of their starts."""
    calls: list[list[Call]] = []
    run = threading.Thread.run

    def run_recorded(thread: threading.Thread) -> None:
        with Recorder() as recorder:
            calls.append(recorder.calls)
            run(thread)

    with pytest.MonkeyPatch.context() as patch, Recorder() as recorder:
        calls.append(recorder.calls)
        patch.setattr(threading.Thread, "run", run_recorded)
        yield calls


def _bytes(name: str, args: tuple) -> int:
    given = args[1] if name in _OUTPUT_FIRST else args[0]
    return sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


def _ranks_of(args: tuple, kwargs: dict[str, Any]) -> tuple[int, ...]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return _members(dist.ProcessGroup.unbox(value))
        if isinstance(value, str) and (group := _named(value)) is not None:
            return _members(group)
    raise ValueError(f"no group among {args}")


def _named(name: str) -> dist.ProcessGroup | None:
    try:
        return distributed_c10d._resolve_process_group(name)
    except (RuntimeError, ValueError):
        return None


def _members(group: dist.ProcessGroup) -> tuple[int, ...]:
    """Ranks of a group; what operators hold is another object than the one that torch.distributed knows."""
    known = next(known for known in distributed_c10d._world.pg_map if known.group_name == group.group_name)
    return tuple(dist.get_process_group_ranks(known))
