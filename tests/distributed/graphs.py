"""CUDA graphs on a CPU: what is recorded is every operator with its very tensors, and what is replayed is these alone.

As on a GPU, recording computes nothing that lasts, a replay reads and writes the addresses of the recording and runs no
Python, and what a GPU could not record is an error.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
"""Kinds of operators whose result Python reads, whose shapes depend on values, and that draw random numbers."""


class Graph(TorchDispatchMode):
    """The stub of `torch.cuda.CUDAGraph`."""

    made: list["Graph"]

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.replays = 0
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        Graph.made.append(self)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        refuse(function, args)
        for argument, given in zip(function._schema.arguments, args, strict=False):
            if argument.is_write:
                self._before.setdefault(given.data_ptr(), (given, given.clone()))
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, tensors(result)))
        return result

    def pool(self) -> int:
        return id(Graph.made)

    def undo(self) -> None:
        """A recording computes nothing."""
        for tensor, before in self._before.values():
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            again = tensors(function(*args, **kwargs))
            for place, value in zip(results, again, strict=True):
                if place.data_ptr() != value.data_ptr():  # neither a view nor in place
                    place.copy_(value)


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def refuse(function: Any, args: tuple) -> None:
    has_mask = any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1:]))
    for tag in REFUSED:
        if tag in function.tags and (function.overloadpacket is not torch.ops.aten.index or has_mask):
            raise AssertionError(f"a graph cannot record {function}: {tag}")


@contextlib.contextmanager
def recording(graph: Graph, pool: int | None, capture_error_mode: str):
    """The stub of `torch.cuda.graph`."""
    assert pool in (None, graph.pool()) and capture_error_mode == "thread_local"
    with graph:
        yield
    graph.undo()


def replay_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Puts the stubs in their places; the graphs that are recorded, one after another."""
    Graph.made = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return Graph.made
