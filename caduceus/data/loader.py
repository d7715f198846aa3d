"""Batches of training and validation samples, for one rank, in order, from any position."""

import itertools
import logging
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import Config
from caduceus.data.dataset import log_dataset, open_dataset
from caduceus.data.sample_reader import SampleArrays, SampleReader
from caduceus.data.samples import TrainingOrder, validation_samples
from caduceus.data.shards import fingerprint
from caduceus.errors import UserError

log = logging.getLogger(__name__)

ORDER_VERSION = 1
"""Part of the loader's fingerprint: to be raised when the code maps a sample number to another sample."""
_PLANNED_SAMPLES = 2048
"""Samples located at once; locating is vectorised."""
FILLER = -1
"""Sample number of a row that only makes the ranks' batches equal; it has no labels."""


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
    """A line for each sample that could not be read and that another crop stands for."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, tokens as int64 (workers hand them over as bytes)."""
        weights = self.loss_weights
        return Batch(
            self.input_ids.to(device, non_blocking=True).long(),
            self.labels.to(device, non_blocking=True).long(),
            None if weights is None else weights.to(device, non_blocking=True),
            self.g,
            self.substituted,
        )

    def pin_memory(self) -> "Batch":
        weights = self.loss_weights
        return replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            loss_weights=None if weights is None else weights.pin_memory(),
        )


def _to_batch(arrays: SampleArrays) -> Batch:
    weights = None if arrays.loss_weights is None else torch.from_numpy(arrays.loss_weights)
    input_ids, labels, g = (torch.from_numpy(array) for array in (arrays.input_ids, arrays.labels, arrays.g))
    return Batch(input_ids, labels, weights, g, arrays.substituted)


@dataclass(frozen=True)
class RankSchedule:
    """Which sample numbers each micro-batch of a rank holds: samples rank, rank + world, … of each global batch."""

    global_batch: int
    micro_batch: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.world):
            raise UserError(
                f"train.global_batch: {self.global_batch} is not a multiple of train.micro_batch {self.micro_batch} "
                f"times {self.world} data-parallel ranks"
            )

    @property
    def per_step(self) -> int:
        """Micro-batches of a rank in an optimizer step."""
        return self.global_batch // (self.micro_batch * self.world)

    def samples(self, micro_batches: np.ndarray) -> np.ndarray:
        """Numbers (n,) of micro-batches since the run's start -> sample numbers (n, micro_batch) int64."""
        step, part = np.divmod(micro_batches, self.per_step)
        within = part[:, None] * self.micro_batch + np.arange(self.micro_batch)
        return step[:, None] * self.global_batch + self.rank + within * self.world


class _MicroBatches(IterableDataset):
    """The micro-batches of a rank from `first` on, for ever; every worker computes its own share of them.

    A `UserError` travels as a value: torch would wrap it in a worker's traceback.
    """

    def __init__(self, order: TrainingOrder, reader: SampleReader, schedule: RankSchedule, first: int) -> None:
        self._order, self._reader, self._schedule, self._first = order, reader, schedule, first

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        planned = max(1, _PLANNED_SAMPLES // self._schedule.micro_batch)

        def plan(chunk: int) -> np.ndarray:
            numbers = self._first + offset + stride * (chunk * planned + np.arange(planned))
            return self._order.locate(self._schedule.samples(numbers).reshape(-1))

        following = plan(0)
        for chunk in itertools.count(1):
            samples, following = following, plan(chunk)
            self._reader.prefetch(np.concatenate([samples, following]))
            for micro_batch in samples.reshape(planned, -1):
                try:
                    yield _to_batch(self._reader.read(micro_batch))
                except UserError as error:
                    yield error
                    return


class TrainLoader:
    """Iterates over a rank's micro-batches, for ever, from the position `samples_consumed` on.

    Attributes: `fingerprint` of everything that decides the order, `seed`, `global_batch`, `per_step` (micro-batches of
    this rank in an optimizer step), `samples_consumed` (of all ranks, by the optimizer steps whose batches were all
    handed out), `substituted` (samples of this rank, since it started, that other crops stood for).
    """

    def __init__(
        self,
        config: Config,
        split: str,
        schedule: RankSchedule,
        positions: tuple[int, int] | None,
        device: torch.device | str,
    ) -> None:
        data, self.seed = config.data, config.train.seed
        both_strands = strands(config) == "both"
        self._dataset = open_dataset(data, split)
        self._order = TrainingOrder(self._dataset, self.seed, both_strands, data.shuffle_block)
        self._reader = SampleReader(self._dataset, data, positions, self._order.substitute)
        self._schedule = schedule
        self._workers = data.workers
        self._device = torch.device(device)
        self._handed_out = 0
        self._max_substituted = data.max_substituted
        self.substituted = 0
        self.global_batch = schedule.global_batch
        self.per_step = schedule.per_step
        self.fingerprint = fingerprint(self._what_decides_the_order(config))
        if schedule.rank == 0:
            log_dataset(self._dataset, self._order.mixture.counts)

    @property
    def samples_consumed(self) -> int:
        return self._handed_out // self.per_step * self.global_batch

    def state(self) -> dict[str, Any]:
        """The loader's whole position, for a checkpoint."""
        return {"fingerprint": self.fingerprint, "seed": self.seed, "samples_consumed": self.samples_consumed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a position. Raises `UserError` where it belongs to another order of samples."""
        for name, here in (("seed", self.seed), ("fingerprint", self.fingerprint)):
            if state[name] != here:
                raise UserError(
                    f"the checkpoint's position is of another order of samples: its data {name} is {state[name]}, this "
                    f"run's is {here}; give the same data.*, train.seed and train.global_batch, or start a new run"
                )
        self.seek(state["samples_consumed"])

    def seek(self, samples_consumed: int) -> None:
        """Go on after so many samples, a multiple of the global batch; holds for iterators made afterwards."""
        step, rest = divmod(samples_consumed, self.global_batch)
        if rest:
            raise ValueError(f"{samples_consumed} samples are no multiple of the global batch {self.global_batch}")
        self._handed_out = step * self.per_step

    def describe(self, g: int) -> dict[str, Any]:
        """Where sample g lies: species, contig, start, end (0-based half-open, forward strand) and strand."""
        return self._reader.describe(self._order.locate(np.array([g]))[0])

    def __iter__(self) -> Iterator[Batch]:
        batches = DataLoader(
            _MicroBatches(self._order, self._reader, self._schedule, self._handed_out),
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_trainer,
        )
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            self._count_substituted(batch)
            self._handed_out += 1
            yield batch.to(self._device)

    def _count_substituted(self, batch: Batch) -> None:
        for line in batch.substituted:
            log.warning("data: %s", line)
        self.substituted += len(batch.substituted)
        if self.substituted > self._max_substituted:
            raise UserError(
                f"data.max_substituted: {self.substituted} samples could not be read; the last: {batch.substituted[-1]}"
            )

    def _what_decides_the_order(self, config: Config) -> dict[str, Any]:
        data = config.data
        return {
            "order_version": ORDER_VERSION,
            "split": self._dataset.split,
            "datasets": self._dataset.fingerprints,
            "mixture": [
                [source.species, int(count)]
                for source, count in zip(self._dataset.sources, self._order.mixture.counts, strict=True)
            ],
            "strands": strands(config),
            **{
                name: getattr(data, name)
                for name in (
                    "seq_len",
                    "objective",
                    "mask_prob",
                    "mask_token_prob",
                    "random_token_prob",
                    "min_acgt",
                    "shuffle_block",
                )
            },
            "seed": self.seed,
            "global_batch": self.global_batch,
        }


class ValidationLoader:
    """Iterates over (species, batch) of a fixed set of crops with fixed masks, every time the same.

    Every rank gets as many batches of the same shapes; where the crops do not
    suffice, a row is a filler without labels.
    Attributes: `species`, and `samples` {species: crops over all ranks}.
    """

    def __init__(
        self,
        config: Config,
        split: str,
        rank: int,
        world: int,
        micro_batch: int,
        positions: tuple[int, int] | None,
        device: torch.device | str,
    ) -> None:
        dataset = open_dataset(config.data, split)
        self._reader = SampleReader(dataset, config.data, positions)
        self._chosen = validation_samples(dataset, config.valid.samples)
        self._rank, self._world, self._micro_batch, self._device = rank, world, micro_batch, device
        self.species = [source.species for source in dataset.sources]
        self.samples = {name: len(chosen) for name, chosen in zip(self.species, self._chosen, strict=True)}
        if rank == 0:
            counts = ", ".join(f"{species} {count}" for species, count in self.samples.items())
            log.info("data: %s: crops of each species: %s", split, counts)

    def __iter__(self) -> Iterator[tuple[str, Batch]]:
        for species, chosen in zip(self.species, self._chosen, strict=True):
            mine = self._rank + self._world * np.arange(math.ceil(len(chosen) / self._world))
            for numbers in np.split(mine, range(self._micro_batch, len(mine), self._micro_batch)):
                batch = _to_batch(self._reader.read(chosen[numbers % len(chosen)]))
                filler = torch.from_numpy(numbers >= len(chosen))
                batch.labels[filler] = IGNORE_LABEL
                batch.g[filler] = FILLER
                yield species, batch.to(self._device)


def build_loader(
    config: Config,
    split: str = "train",
    *,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    micro_batch: int | None = None,
    positions: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> TrainLoader:
    """The training batches of data-parallel rank `rank` of `world`, beginning after `start` samples of all ranks.

    `micro_batch` defaults to `train.micro_batch`. `positions` (first, end) is the slice of every sequence that this
    rank reads; default the whole. The batches come on `device`. Raises `UserError` for shards or keys that do not fit.
    """
    schedule = RankSchedule(config.train.global_batch, micro_batch or config.train.micro_batch, rank, world)
    loader = TrainLoader(config, split, schedule, positions, device)
    loader.seek(start)
    return loader


def build_validation(
    config: Config,
    split: str = "valid",
    *,
    rank: int = 0,
    world: int = 1,
    micro_batch: int | None = None,
    positions: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> ValidationLoader:
    """The validation batches of data-parallel rank `rank` of `world`: at most `valid.samples` crops of each species.

    Crops and masks depend on the genomes and `data.*` alone, not on `train.seed`. Other arguments as of `build_loader`.
    """
    micro_batch = micro_batch or config.train.micro_batch
    return ValidationLoader(config, split, rank, world, micro_batch, positions, device)


def strands(config: Config) -> str:
    """`data.strands` with auto resolved: forward where the model sees both strands by itself, both otherwise."""
    if config.data.strands == "auto":
        return "forward" if config.model.rcps else "both"
    return config.data.strands


def _leave_signals_to_the_trainer(_: int) -> None:
    """A terminal or a cluster signals all processes of a job; only the trainer decides what follows.

    The second SIGTERM ends a worker: that is how the trainer's own process ends one that hangs.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
