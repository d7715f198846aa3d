"""A micro-batch, and the numbers of the samples in each micro-batch of a rank."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config.by_step import BatchRamp
from caduceus.data.objective import SampleArrays
from caduceus.errors import UserError

REGIONS = ("nonrepeat", "repeat")
"""Classes of bases: upper case, and lower case (soft-masked)."""
FILLER = -1
"""Sample number of a filler: a row without labels that only makes the ranks' batches equally large."""


@dataclass
class Batch:
    """B samples of L positions (or of this rank's slice of them)."""

    input_ids: torch.Tensor
    """(B, L) int64."""
    labels: torch.Tensor
    """(B, L) int64, `IGNORE_LABEL` where nothing is predicted."""
    loss_weights: torch.Tensor | None
    """(B, L) float32; None where all are 1."""
    g: torch.Tensor
    """(B,) int64 sample numbers, on the CPU; `FILLER` for a row without a sample."""
    substituted: tuple[str, ...] = ()
    """One line for each sample that could not be read and was replaced by another crop."""
    choices: torch.Tensor | None = None
    """(B,) int64 on the CPU: the crop that was taken for each sample, 0 for its own, n for its n-th substitute."""
    repeats: torch.Tensor | None = None
    """(B, L) bool, whether the base to be predicted is soft-masked. Batches of a validation have it, and the first
    micro-batch of each training step where `monitor.every` is set.
    """
    starts: torch.Tensor | None = None
    """(B, L) bool, True at the first position of each sequence that is packed into a row; None where no row is packed.
    """
    counted: torch.Tensor | None = None
    """The value of `label_weight` from before the batch was moved to a GPU."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, tokens as int64 (workers hand them over as bytes)."""
        weights = self.loss_weights
        return Batch(
            self.input_ids.to(device, non_blocking=True).long(),
            self.labels.to(device, non_blocking=True).long(),
            None if weights is None else weights.to(device, non_blocking=True),
            self.g,
            self.substituted,
            self.choices,
            None if self.repeats is None else self.repeats.to(device, non_blocking=True),
            None if self.starts is None else self.starts.to(device, non_blocking=True),
            self.label_weight(),
        )

    def label_weight(self) -> torch.Tensor:
        """The sum of the weights of the labelled bases: the weight of the batch in the loss.

        It is computed on the CPU, before the batch goes to a GPU, so that nothing has to wait for the GPU.
        """
        if self.counted is not None:
            return self.counted
        labelled = self.labels != IGNORE_LABEL
        weights = labelled if self.loss_weights is None else self.loss_weights * labelled
        return weights.sum(dtype=torch.float64)

    def arguments(self, observed: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which a step calls the model; `observed`: also for its losses by region."""
        packed = {} if self.starts is None else {"starts": self.starts}
        regions = {"repeats": self.repeats} if observed and self.repeats is not None else {}
        return (self.input_ids, self.labels, self.loss_weights), {"return_logits": False, **packed, **regions}

    def pin_memory(self) -> "Batch":
        weights = self.loss_weights
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            loss_weights=None if weights is None else weights.pin_memory(),
            repeats=None if self.repeats is None else self.repeats.pin_memory(),
            starts=None if self.starts is None else self.starts.pin_memory(),
        )


def to_batch(arrays: SampleArrays) -> Batch:
    weights = None if arrays.loss_weights is None else torch.from_numpy(arrays.loss_weights)
    input_ids, labels, g = (torch.from_numpy(array) for array in (arrays.input_ids, arrays.labels, arrays.g))
    choices = None if arrays.choices is None else torch.from_numpy(arrays.choices)
    repeats = None if arrays.repeats is None else torch.from_numpy(arrays.repeats)
    starts = None if arrays.starts is None else torch.from_numpy(arrays.starts)
    return Batch(input_ids, labels, weights, g, arrays.substituted, choices, repeats, starts)


@dataclass(frozen=True)
class RankSchedule:
    """Which sample numbers each micro-batch of a rank holds: samples rank, rank + world, … of each global batch."""

    ramp: BatchRamp
    micro_batch: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        for size in self.ramp.sizes:
            if size % (self.micro_batch * self.world):
                name = "train.batch_ramp" if len(self.ramp.sizes) > 1 else "train.global_batch"
                raise UserError(
                    f"{name}: {size} is not a multiple of train.micro_batch {self.micro_batch} "
                    f"times {self.world} data-parallel ranks"
                )

    def per_step(self, steps: int) -> int:
        """Micro-batches of a rank in the optimizer step that follows the first `steps` steps."""
        return self.ramp.size(steps) // (self.micro_batch * self.world)

    def micro_batches_before(self, steps: int) -> int:
        """Micro-batches of a rank in the first `steps` optimizer steps together."""
        return self.ramp.samples_before(steps) // (self.micro_batch * self.world)

    def steps_before(self, micro_batches: int) -> int:
        """How many whole optimizer steps the first `micro_batches` micro-batches of a rank make."""
        return self.ramp.steps_before(micro_batches * self.micro_batch * self.world)

    def begins_step(self, micro_batch: int) -> bool:
        """Whether a micro-batch is the first of its step."""
        return self.micro_batches_before(self.steps_before(micro_batch)) == micro_batch

    def samples(self, micro_batches: np.ndarray) -> np.ndarray:
        """Numbers (n,) of micro-batches since the run's start -> sample numbers (n, micro_batch) int64."""
        firsts = np.array([self.micro_batches_before(step) for step in self.ramp.steps])
        part = np.searchsorted(firsts, micro_batches, side="right") - 1
        per_step = np.array(self.ramp.sizes)[part] // (self.micro_batch * self.world)
        step, number = np.divmod(micro_batches - firsts[part], per_step)
        before = firsts[part] + step * per_step
        within = number[:, None] * self.micro_batch + np.arange(self.micro_batch)
        return before[:, None] * self.micro_batch * self.world + self.rank + within * self.world
