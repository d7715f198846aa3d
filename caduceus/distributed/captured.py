"""`train.cuda_graphs: passes`: a micro-batch's forward and backward passes as one CUDA graph.

A graph is recorded once and then launched as a whole, so that a step needs neither Python nor the launches of some
thousand kernels. It reads and writes the addresses that it was recorded with: micro-batches are copied into permanent
tensors, and gradients are added up in permanent tensors. Nothing that it records may wait for the GPU, draw random
numbers or depend on values; `caduceus.config.checks.refuse_cuda_graphs` refuses what cannot be recorded.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from caduceus.config import Config
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import BuildOptimizer, Strategy
from caduceus.model.precision import autocast

WARM_UP = 3
"""Passes before a recording, in which kernels are compiled and libraries allocate their memory."""
_ALIGNMENT = 64
"""The size of each parameter's part of the gradients is a multiple of this: its address then allows loads of any width.
"""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Passed:
    """The results of the passes over a micro-batch besides gradients; `told` and `region_sums`: the numbers of an
    observer and the losses by region, if it was observed.
    """

    share: Tensor
    """() float64, this micro-batch's share of the loss of the whole global batch."""
    sums: Tensor
    """(2, B) float64, losses and weights of the sequences."""
    told: Tensor | None
    region_sums: Tensor | None

    def copied(self) -> "Passed":
        """A copy in memory that no replay overwrites."""
        return Passed(*(None if value is None else value.clone() for value in vars(self).values()))


@dataclass(frozen=True)
class Recording:
    """A graph, with the tensors from which it reads a micro-batch and into which it writes its results."""

    graph: torch.cuda.CUDAGraph
    arguments: Arguments
    passed: Passed


class Captured(Strategy):
    """A whole model on every rank. The gradients of all micro-batches are added up in one tensor, and exchanged between
    ranks together, after the last micro-batch: no exchange is part of a graph.
    """

    def __init__(self, config: Config, ranks: Ranks, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        super().__init__(config, ranks, model, build_optimizer)
        self._precision = config.train.precision
        self._recordings: dict[Any, Recording] = {}
        self._weight = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._gradients: Tensor | None = None
        self._parts: list[tuple[nn.Parameter, Tensor]] = []

    def replay(self, arguments: Arguments, weight: Tensor, observed: bool) -> Passed:
        """Run both passes over a micro-batch, and add its gradients to the existing ones.

        `arguments`: those of the model. `weight`: the sum of the weights of the labels of the whole global batch.
        `observed`: whether an observer looks at the forward pass. The first call with arguments of a kind records a
        graph.
        """
        kind = (observed, *(_kind_of(leaf) for leaf in tree_leaves(arguments)))
        self._weight.copy_(weight)
        if kind not in self._recordings:
            self._recordings[kind] = self._record(arguments, observed)
        recording = self._recordings[kind]
        for static, given in zip(tree_leaves(recording.arguments), tree_leaves(arguments), strict=True):
            if isinstance(given, Tensor):
                static.copy_(given, non_blocking=True)
        self._hand_out_gradients()
        recording.graph.replay()
        return recording.passed.copied()

    def exchange(self) -> None:
        """Add up the gradients of a step over all ranks."""
        if self.ranks.world > 1:
            dist.all_reduce(self._gradients)

    def discard_gradients(self) -> None:
        """Clear the gradients, and remove them from the parameters, as every other strategy does."""
        super().discard_gradients()
        if self._gradients is not None:
            self._gradients.zero_()

    def _record(self, arguments: Arguments, observed: bool) -> Recording:
        static = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self.optimizer.zero_grad(set_to_none=True)
            for _ in range(WARM_UP):
                self._pass_through(static, observed)
        here.wait_stream(aside)
        if self._gradients is None:
            self._place_gradients()
        self._hand_out_gradients()
        graph = torch.cuda.CUDAGraph()
        # All graphs share a memory pool: they never run at the same time, and their results are copied. Other threads
        # may call CUDA meanwhile, such as the one that pins the memory of batches.
        pool = next((recording.graph.pool() for recording in self._recordings.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            passed = self._pass_through(static, observed)
        return Recording(graph, static, passed)

    def _pass_through(self, arguments: Arguments, observed: bool) -> Passed:
        positional, named = arguments
        watching = self.network.observing() if observed else contextlib.nullcontext()
        with watching as observer, autocast(self.ranks.device, self._precision):
            output = self.model(*positional, **named)
        share = output.loss_sum.sum() / self._weight.to(output.loss_sum.dtype)
        self.backward(share)
        sums = torch.stack([output.loss_sum, output.weight_sum]).detach().double()
        told = observer.told() if observed else None
        return Passed(share.detach().double(), sums, told, getattr(output, "region_sums", None))

    def _place_gradients(self) -> None:
        """Give every parameter that has a gradient its part of one tensor."""
        found = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        sizes = [math.ceil(parameter.numel() / _ALIGNMENT) * _ALIGNMENT for parameter in found]
        self._gradients = torch.zeros(sum(sizes), dtype=found[0].dtype, device=self.ranks.device)
        parts = self._gradients.split(sizes)
        self._parts = [(p, part[: p.numel()].view_as(p)) for p, part in zip(found, parts, strict=True)]

    def _hand_out_gradients(self) -> None:
        for parameter, gradient in self._parts:
            parameter.grad = gradient


def _kind_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf
