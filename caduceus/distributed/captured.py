"""`train.cuda_graphs: passes`: a micro-batch's forward and backward passes as one CUDA graph.

A graph is recorded once and then launched whole, so that neither Python nor a launch for each of some thousand kernels
takes part in a step. It reads and writes the addresses that it was recorded with: micro-batches are copied into tensors
that stay, and gradients are added up in tensors that stay. Nothing that it records may wait for the GPU, draw random
numbers or depend on values; what can not be recorded is refused by `caduceus.config.checks.refuse_cuda_graphs`.
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
"""Passes before a recording, in which kernels are compiled and libraries take their memory."""
_ALIGNMENT = 64
"""Elements of which each parameter's part of the gradients is a multiple: its address then suits loads of any width."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Passed:
    """What the passes over a micro-batch give besides gradients; `told` where an observer looked at them."""

    share: Tensor
    """() float64, of the loss of the whole global batch."""
    sums: Tensor
    """(2, B) float64, losses and weights of the sequences."""
    told: Tensor | None

    def copied(self) -> "Passed":
        """The same in memory that no replay writes."""
        return Passed(self.share.clone(), self.sums.clone(), None if self.told is None else self.told.clone())


@dataclass(frozen=True)
class Recording:
    """A graph, and where it finds a micro-batch and leaves what it found."""

    graph: torch.cuda.CUDAGraph
    arguments: Arguments
    passed: Passed


class Captured(Strategy):
    """A whole model on every rank. Gradients of all micro-batches are added up in one tensor, and over ranks at once,
    after the last of them: no exchange is part of a graph.
    """

    def __init__(self, config: Config, ranks: Ranks, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        super().__init__(config, ranks, model, build_optimizer)
        self._precision = config.train.precision
        self._recordings: dict[Any, Recording] = {}
        self._weight = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._gradients: Tensor | None = None
        self._parts: list[tuple[nn.Parameter, Tensor]] = []

    def replay(self, arguments: Arguments, weight: Tensor, observed: bool) -> Passed:
        """Both passes over a micro-batch, whose gradients are added to those that are there.

        `arguments`: of the model. `weight`: that of the labels of the whole global batch. `observed`: an observer looks
        at the forward pass. The first call for arguments of a kind records them.
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
        """Clear the gradients, and leave none with the parameters, as every other strategy does."""
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
        # All graphs take their memory from one pool: they never run at a time, and what they give is copied. Other
        # threads may ask CUDA for something meanwhile, such as the one that pins the memory of batches.
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
        return Passed(share.detach().double(), sums, observer.told() if observed else None)

    def _place_gradients(self) -> None:
        """Give every parameter that the passes found a gradient of its part of one tensor."""
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
