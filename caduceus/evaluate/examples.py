"""Labelled examples in the form that the trainer takes: batches, the order of samples, and a network with its loss.

Shapes: B examples, L length, O outputs of a network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caduceus.alphabet import reverse_complement
from caduceus.evaluate.labelled import Task
from caduceus.files import fingerprint


@dataclass(frozen=True)
class Examples:
    """The input of a network for each example, and its label; `sizes`: bases, which limit the size of batches.

    labels: numbers of classes or values (n,); for several labels (n, classes) of 0 and 1, or (n, values); per base an
    array (L,), per bin (bins, values), for each example. NaN, and a class below 0, mean that there is no label.
    """

    inputs: Sequence[Any]
    labels: Sequence[Any]
    sizes: Sequence[int]

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class ExampleBatch:
    """A micro-batch. `labels` and `weights` have the shape of the network's outputs without the last axis; weights are
    0 where there is no label. `g`: the numbers of its samples.
    """

    inputs: list[Any]
    labels: Tensor
    weights: Tensor
    g: Tensor

    def label_weight(self) -> Tensor:
        """The sum of the weights, float64: the weight of the batch in the loss."""
        return self.weights.sum(dtype=torch.float64)

    def arguments(self, observed: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which a step calls a `WithLoss`; an observed one needs no others."""
        return (self.inputs, self.labels, self.weights), {}


class Losses(NamedTuple):
    """The sums of losses and of weights of each example, (B,) both."""

    loss_sum: Tensor
    weight_sum: Tensor


class WithLoss(nn.Module):
    """A network with its loss on a task: cross-entropy, binary cross-entropy of each label, or squared error."""

    def __init__(self, net: nn.Module, task: Task) -> None:
        super().__init__()
        self.net, self.task = net, task

    def forward(self, inputs: list[Any], labels: Tensor, weights: Tensor) -> Losses:
        outputs = self.net(inputs)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        weights = weights.to(outputs)
        losses = losses_of(self.task, outputs, labels) * weights
        return Losses(*(values.reshape(len(inputs), -1).sum(1) for values in (losses, weights)))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Trainable parameters in two groups, with weight decay and without it (biases, norms, A_log and D)."""
        backbone = getattr(self.net, "backbone", None)
        exempt = {f"net.backbone.{name}" for name in backbone.no_weight_decay_parameters()} if backbone else set()
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        bare = [p for name, p in named if name in exempt or p.ndim < 2]
        decayed = [p for name, p in named if name not in exempt and p.ndim >= 2]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": bare, "weight_decay": 0.0}]


def losses_of(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of each label, of the shape of `labels`, from outputs (…, O)."""
    if task.classes is None:
        return ((outputs if task.values else outputs[..., 0]) - labels.to(outputs)) ** 2
    if task.several:
        return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="none")
    return F.cross_entropy(outputs.movedim(-1, 1), labels.long(), reduction="none")


def label_tensors(task: Task, labels: Sequence[Any], class_weights: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """Labels and weights of a batch; shorter sequences are padded with weight 0."""
    if task.per_base:
        rows = np.full((len(labels), max(map(len, labels)), *np.shape(labels[0])[1:]), np.nan)
        for row, values in zip(rows, labels, strict=True):
            row[: len(values)] = values
    else:
        rows = np.asarray(labels, dtype=float)
    there = np.isfinite(rows) & ((rows >= 0) if task.classes is not None else True)
    if task.classes is None:
        rows = (rows - np.asarray(task.mean)) / np.asarray(task.spread)
    rows = np.where(there, rows, 0)
    weights = there.astype(np.float32)
    if class_weights is not None:
        weights *= class_weights[rows.astype(np.int64)].astype(np.float32)
    return torch.from_numpy(rows), torch.from_numpy(weights)


def micro_batches(sizes: Sequence[int], most: int, rows: Sequence[int]) -> list[list[int]]:
    """Batches of rows in their order: the longest size times the number of rows is at most `most`, or the batch is one
    row.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in map(int, rows):
        longest = max(longest, sizes[row])
        if not batches or longest * (len(batches[-1]) + 1) > most:
            batches.append([])
            longest = sizes[row]
        batches[-1].append(row)
    return batches


@dataclass
class ExampleLoader:
    """Batches of examples for the trainer; the order of each epoch is a function of seed and epoch alone.

    A global batch never crosses the end of an epoch. Rank r of the world takes its rows r, r + world, … in
    micro-batches of at most `most` bases. augment: in each epoch a coin decides which strand of a sequence is shown.
    """

    examples: Examples
    task: Task
    batch_size: int
    most: int
    seed: int
    device: torch.device
    rank: int = 0
    world: int = 1
    class_weights: np.ndarray | None = None
    augment: bool = False
    samples_consumed: int = 0
    species: tuple[str, ...] = ("examples",)
    substituted: int = 0
    _epoch: int = field(default=-1, repr=False)

    @property
    def fingerprint(self) -> str:
        """A hash of the number of examples, and of the values that decide what is drawn."""
        return fingerprint({"examples": len(self.examples), "batch_size": self.batch_size, "seed": self.seed})

    @property
    def global_batch(self) -> int:
        """Examples of the next step; the last step of an epoch may have fewer."""
        return self.batch_size

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.examples) // self.batch_size)

    @property
    def per_step(self) -> int:
        """Micro-batches of this rank in the next step."""
        return len(self._next())

    def __iter__(self) -> Iterator[ExampleBatch]:
        while True:
            batches, end = self._next(), self._end()
            for number, rows in enumerate(batches, start=1):
                batch = self._batch(rows)
                if number == len(batches):
                    self.samples_consumed = end
                yield batch

    def _end(self) -> int:
        epoch, first = divmod(self.samples_consumed, len(self.examples))
        return epoch * len(self.examples) + min(first + self.batch_size, len(self.examples))

    def _next(self) -> list[list[int]]:
        epoch, first = divmod(self.samples_consumed, len(self.examples))
        if self._epoch != epoch:
            rng = np.random.default_rng((self.seed, epoch + 1))
            self._epoch, self._order = epoch, rng.permutation(len(self.examples))
            self._turned = rng.integers(2, size=len(self.examples)) * self.augment
        rows = self._order[first : first + self.batch_size][self.rank :: self.world]
        # A rank without a row of the batch must still take part in the step.
        return micro_batches(self.examples.sizes, self.most, rows) or [[]]

    def _batch(self, rows: list[int]) -> ExampleBatch:
        taken = rows or [0]
        inputs, given = ([of[row] for row in taken] for of in (self.examples.inputs, self.examples.labels))
        for place, row in enumerate(taken):
            if self._turned[row]:
                inputs[place] = reverse_complement(inputs[place])
                given[place] = given[place][::-1] if self.task.per_base else given[place]
        labels, weights = label_tensors(self.task, given, self.class_weights)
        weights = weights if rows else torch.zeros_like(weights)
        return ExampleBatch(inputs, labels.to(self.device), weights.to(self.device), torch.tensor(taken))

    def state(self) -> dict[str, Any]:
        """The position: {fingerprint, seed, samples_consumed}."""
        return {"fingerprint": self.fingerprint, "seed": self.seed, "samples_consumed": self.samples_consumed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self.samples_consumed = state["samples_consumed"]

    def describe(self, number: int) -> dict[str, Any]:
        """The row of a sample, for the log of skipped steps."""
        return {"row": number}

    def epochs(self) -> dict[str, float]:
        """Epochs so far."""
        return {"examples": self.samples_consumed / len(self.examples)}
