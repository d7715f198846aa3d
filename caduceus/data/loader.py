"""Batches of training and validation samples, for one rank, in order, from any position."""

import atexit
import logging
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from caduceus.allocator import keep_freed_memory
from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import Config, order_values
from caduceus.config.by_step import BatchRamp
from caduceus.data.batch import FILLER, Batch, RankSchedule, to_batch
from caduceus.data.reading import SUBSTITUTES, SampleReader
from caduceus.data.samples import resolve_strands, validation_samples
from caduceus.data.shard_samples import ShardSamples
from caduceus.data.split_sources import open_sources
from caduceus.data.stream import SPECIES, StreamSamples, StreamValidation
from caduceus.data.tars import Remark
from caduceus.devices import is_gpu
from caduceus.errors import PeerError, UserError
from caduceus.files import fingerprint

log = logging.getLogger(__name__)

_NONE_LEFT = SUBSTITUTES + 1
"""The choice of a rank that could read no crop."""
_MOST_WITHOUT_LABEL = 1 << 20
"""If a rank has seen so many positions without a labelled base that counts, none is expected to come."""
_LABELS_EXPECTED = 64
"""Labelled bases that are expected in that many positions, also where only a small share is labelled."""


class TrainLoader:
    """Iterates over a rank's micro-batches without end, from the position `samples_consumed` on.

    Attributes: `fingerprint` of everything that decides the order, `seed`, `per_step` and `global_batch` (micro-batches
    of this rank, and sequences of all ranks, in the current optimizer step), `samples_consumed` (of all ranks, in the
    optimizer steps whose batches were all handed out), `substituted` (samples of this rank that were replaced by other
    crops since it started).
    """

    def __init__(
        self,
        config: Config,
        samples: ShardSamples | StreamSamples,
        schedule: RankSchedule,
        device: torch.device | str,
        largest_of_peers: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.seed = config.train.seed
        self.substituted = 0
        self.fingerprint = fingerprint(
            {
                **samples.what_decides_the_order(),
                **order_values(config),
                "strands": resolve_strands(config),
            }
        )
        self._told: set[str] = set()
        self._positions_without_label: int | None = 0
        """Positions since the start; None once a labelled base that counts was seen."""
        self._patience = max(_MOST_WITHOUT_LABEL, round(_LABELS_EXPECTED / (config.data.mask_prob or 1)))
        self._samples = samples
        self._schedule = schedule
        self._workers = config.data.workers
        self._max_substituted = config.data.max_substituted
        self._device = torch.device(device)
        self._largest_of_peers = largest_of_peers
        self._handed_out = 0
        if schedule.rank == 0:
            samples.log()

    @property
    def samples_consumed(self) -> int:
        return self._schedule.ramp.samples_before(self._steps)

    @property
    def global_batch(self) -> int:
        return self._schedule.ramp.size(self._steps)

    @property
    def per_step(self) -> int:
        return self._schedule.per_step(self._steps)

    @property
    def _steps(self) -> int:
        """The number of optimizer steps whose batches were all handed out."""
        return self._schedule.steps_before(self._handed_out)

    def state(self) -> dict[str, Any]:
        """The loader's position, for a checkpoint: {fingerprint, seed, samples_consumed}."""
        return {"fingerprint": self.fingerprint, "seed": self.seed, "samples_consumed": self.samples_consumed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a position. Raises `UserError` where it belongs to another order of samples."""
        for name, here in (("seed", self.seed), ("fingerprint", self.fingerprint)):
            if state[name] != here:
                raise UserError(
                    f"the checkpoint's position belongs to another order of samples: its data {name} is {state[name]}, "
                    f"this run's is {here}; give the same data.*, train.seed and train.global_batch, or start a new run"
                )
        self.seek(state["samples_consumed"])

    def seek(self, samples_consumed: int) -> None:
        """Go on after the first `samples_consumed` samples, which must make whole steps. It affects iterators made
        afterwards.
        """
        steps = self._schedule.ramp.steps_before(samples_consumed)
        if self._schedule.ramp.samples_before(steps) != samples_consumed:
            raise ValueError(
                f"{samples_consumed} samples do not make whole steps of the global batch {self.global_batch}"
            )
        self._handed_out = self._schedule.micro_batches_before(steps)

    def describe(self, g: int) -> dict[str, Any]:
        """Where sample g lies: species, contig, start, end (0-based half-open, forward strand) and strand."""
        return self._samples.describe(g)

    @property
    def species(self) -> tuple[str, ...]:
        """The species that samples are drawn from, by row."""
        return self._samples.species

    def epochs(self) -> dict[str, float]:
        """Epochs of each species that the samples so far make; empty where that is not known."""
        return self._samples.epochs(self.samples_consumed)

    def species_rows(self, batch: Batch) -> torch.Tensor:
        """The row of `species` to which each sample of a batch belongs, (B,) int64 on the CPU."""
        return torch.from_numpy(self._samples.species_rows(batch.g.numpy()))

    def __iter__(self) -> Iterator[Batch]:
        batches = DataLoader(
            self._samples.micro_batches(self._schedule, self._handed_out),
            batch_size=None,
            num_workers=self._workers,
            pin_memory=is_gpu(self._device),
            worker_init_fn=_start_worker,
        )
        for batch in _until_failure(batches):
            if self._largest_of_peers is not None:
                batch = self._agreed(batch)
            if isinstance(batch, Exception):
                raise batch
            self._count_substituted(batch)
            self._require_labels(batch)
            self._handed_out += 1
            yield batch.to(self._device)

    def _agreed(self, batch: Batch | Exception) -> Batch | Exception:
        """The micro-batch, of crops that can be read by all the ranks that share its sequences.

        Each rank proposes, for each sample, the first crop that it can read itself. A rank that is behind the farthest
        proposal reads again from there on, until all proposals are the same: the first crop that every rank can read,
        which a single rank that reads whole crops would take. Where all ranks can read, this costs one exchange of a
        few numbers.
        """
        numbers = self._schedule.samples(np.array([self._handed_out]))[0]
        while True:
            failed = isinstance(batch, Exception)
            own = torch.full((len(numbers),), _NONE_LEFT) if failed else batch.choices
            farthest, negated_nearest = self._largest_of_peers(torch.stack([own, -own]))
            if farthest.max() == _NONE_LEFT:
                return batch if failed else PeerError("another rank that shares the sequence failed; it says why")
            if torch.equal(farthest, -negated_nearest):
                return batch
            if not torch.equal(own, farthest):
                try:
                    batch = self._samples.read(numbers, farthest.numpy(), self._schedule.begins_step(self._handed_out))
                except UserError as error:
                    batch = error

    def _count_substituted(self, batch: Batch) -> None:
        for line in batch.substituted:
            if line in self._told:  # a damaged tar, which every pass and every worker finds again
                continue
            self._told.add(line)
            log.warning("data: %s", line)
            if isinstance(line, Remark):
                continue
            self.substituted += 1
            if self.substituted > self._max_substituted:
                what = self._samples.substituted_are
                raise UserError(f"data.max_substituted: {self.substituted} {what}; the last: {line}")

    def _require_labels(self, batch: Batch) -> None:
        """Raise `UserError` where no labelled base counts, so that training would run at a loss of 0."""
        if self._positions_without_label is None:
            return
        labelled = batch.labels != IGNORE_LABEL
        if (labelled if batch.loss_weights is None else labelled & (batch.loss_weights > 0)).any():
            self._positions_without_label = None
            return
        self._positions_without_label += labelled.numel()
        if self._positions_without_label > self._patience:
            raise UserError(
                f"data: not one of the first {self._positions_without_label:,} bases is labelled and counts for the "
                "loss, so nothing is learned; see data.mask_prob, data.repeat_weight (0 leaves out lower-case bases), "
                "data.weights_bed and data.min_acgt"
            )


class ValidationLoader:
    """Iterates over (species, batch) of a fixed set of crops with fixed masks, every time the same.

    Every rank gets the same number of batches, of the same shapes; where there are too few crops, rows are fillers
    without labels. Attributes: `species`, `samples` {species: crops of all ranks together}, and `rows`, the rows of a
    batch.
    """

    def __init__(
        self,
        chosen: dict[str, np.ndarray],
        reader: SampleReader | StreamValidation,
        rank: int,
        world: int,
        micro_batch: int,
        device: torch.device | str,
    ) -> None:
        self._chosen, self._reader = chosen, reader
        self._rank, self._world, self._device = rank, world, device
        self.rows = micro_batch
        self.species = list(chosen)
        self.samples = {name: len(samples) for name, samples in chosen.items()}
        if rank == 0:
            reader.log()
            counts = ", ".join(f"{species} {count}" for species, count in self.samples.items())
            log.info("data: crops of each species to validate on: %s", counts)

    def __iter__(self) -> Iterator[tuple[str, Batch]]:
        for species, chosen in self._chosen.items():
            mine = self._rank + self._world * np.arange(math.ceil(len(chosen) / self._world))
            for numbers in np.split(mine, range(self.rows, len(mine), self.rows)):
                yield species, self._batch(chosen[numbers % len(chosen)], numbers >= len(chosen))

    def crops(self, wanted: Sequence[tuple[str, int]]) -> Iterator[Batch]:
        """Batches of the crops `wanted`, given by species and number (`Batch.g`, or `FILLER`); each rank may want
        others.
        """
        for first in range(0, len(wanted), self.rows):
            some = wanted[first : first + self.rows]
            rows = [(self._chosen[species], max(number, 0)) for species, number in some]
            samples = np.concatenate([chosen[row : row + 1] for chosen, row in rows])
            yield self._batch(samples, np.array([number == FILLER for _, number in some]))

    def describe(self, species: str, number: int) -> dict[str, Any]:
        """Where a crop lies: species, contig, start, end (0-based half-open, forward strand) and strand."""
        return self._reader.describe(self._chosen[species][number])

    def _batch(self, samples: np.ndarray, is_filler: np.ndarray) -> Batch:
        batch = to_batch(self._reader.read(samples, repeats=True))
        filler = torch.from_numpy(is_filler)
        batch.labels[filler] = IGNORE_LABEL
        batch.g[filler] = FILLER
        return batch.to(self._device)


def build_loader(
    config: Config,
    split: str = "train",
    *,
    rank: int = 0,
    world: int = 1,
    micro_batch: int | None = None,
    positions: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    largest_of_peers: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> TrainLoader:
    """The training batches of data-parallel rank `rank` of `world`, from the first one on; `seek` moves to another.

    `micro_batch` defaults to `train.micro_batch`. `positions` (first, end) is the slice of every sequence that this
    rank reads; None is the whole sequence. The batches are on `device`. Ranks that read slices of the same sequences
    must take the same crops, also where one of them cannot read its slice: `largest_of_peers` gives the elementwise
    maximum over them of an int64 tensor on the CPU. Raises `UserError` for shards or keys that do not fit.
    """
    schedule = RankSchedule(BatchRamp.of(config.train), micro_batch or config.train.micro_batch, rank, world)
    stream = config.data.mode == "stream"
    samples = StreamSamples(config, positions) if stream else ShardSamples(config, split, positions)
    return TrainLoader(config, samples, schedule, device, None if stream else largest_of_peers)


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

    Crops and masks depend on the genomes and `data.*` alone, not on `train.seed`. The other arguments are those of
    `build_loader`.
    """
    micro_batch = micro_batch or config.train.micro_batch
    if config.data.mode == "stream":
        reader = StreamValidation(config, positions)
        chosen = {SPECIES: reader.samples}
    else:
        split_sources = open_sources(config.data, split)
        reader = SampleReader(split_sources, config, positions)
        chosen = validation_samples(split_sources, config.valid.samples)
    return ValidationLoader(chosen, reader, rank, world, micro_batch, device)


def _until_failure(batches: Iterable[Batch | UserError]) -> Iterator[Batch | Exception]:
    """The batches; where making one fails (a worker may have been killed), the exception comes last, as a value."""
    try:
        yield from batches
    except Exception as error:
        yield error


def _start_worker(_: int) -> None:
    keep_freed_memory()
    _leave_signals_to_the_trainer()


def _leave_signals_to_the_trainer() -> None:
    """Ignore signals that a terminal or a cluster sends to all processes of a job: only the trainer decides what
    follows.

    The second SIGTERM ends a worker: the trainer's process ends a hanging worker that way.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@atexit.register
def _end_workers() -> None:
    """End the workers at exit: a process that fails would send them one SIGTERM and wait without end if they ignore it.

    It is registered after multiprocessing's own handler, so it runs before that.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a worker that was killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
