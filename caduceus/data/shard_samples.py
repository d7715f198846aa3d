"""Training samples from shards: the number of a micro-batch alone decides its samples."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from caduceus.config import Config
from caduceus.data.batch import Batch, RankSchedule, to_batch
from caduceus.data.reading import SampleReader
from caduceus.data.samples import TrainingOrder
from caduceus.data.split_sources import log_sources, open_sources
from caduceus.errors import UserError

log = logging.getLogger(__name__)

ORDER_VERSION = 1
"""Part of the loader's fingerprint. Raise it when the code maps a sample number to another sample."""
_PLANNED_SAMPLES = 2048
"""Samples that are located at once, as locating is vectorised."""


class ShardSamples:
    """The samples of a training loader with `data.mode=shards`."""

    substituted_are = "samples could not be read"

    def __init__(self, config: Config, split: str, positions: tuple[int, int] | None) -> None:
        self._split_sources = open_sources(config.data, split)
        self._order = TrainingOrder(self._split_sources, config)
        self._reader = SampleReader(self._split_sources, config, positions, self._order.substitute)
        self._observed = bool(config.monitor.every)

    def log(self) -> None:
        counts, epochs = self._order.mixture.counts, self._order.epochs
        log_sources(self._split_sources, counts, epochs.bases_seen, epochs.differ)

    def what_decides_the_order(self) -> dict[str, Any]:
        """The facts, beyond the keys of the configuration, that must be the same for a position in the order to be
        valid.
        """
        first, *others = self._order.mixture.counts.tolist()
        stages = {"stages_of_mixture": others} if others else {}
        return {
            "order_version": ORDER_VERSION,
            "split": self._split_sources.split,
            "datasets": self._split_sources.fingerprints,
            "mixture": [[source.species, n] for source, n in zip(self._split_sources.sources, first, strict=True)],
            **stages,
            **self._reader.what_decides_the_weights(),
        }

    def describe(self, g: int) -> dict[str, Any]:
        return self._reader.describe(self._order.locate(np.array([g]))[0])

    @property
    def species(self) -> tuple[str, ...]:
        """The species that samples are drawn from, by row."""
        return tuple(source.species for source in self._split_sources.sources)

    def species_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Sample numbers (B,) -> the row of `species` (B,) that each is drawn from; a substitute has the same
        species.
        """
        return self._order.mixture.locate(numbers)[0]

    def epochs(self, g: int) -> dict[str, float]:
        """Epochs of each species that the first `g` samples make."""
        epochs = self._order.epochs.passed(self._order.mixture.drawn(g))
        return dict(zip(self.species, epochs.tolist(), strict=True))

    def read(self, numbers: np.ndarray, least: np.ndarray, begins_step: bool) -> Batch:
        """Read the samples (B,) of a micro-batch, which may be its step's first. For each sample try no crop before
        number `least` (B,): a peer that shares it could not read those.
        """
        return to_batch(self._reader.read(self._order.locate(numbers), least, begins_step and self._observed))

    def micro_batches(self, schedule: RankSchedule, first: int) -> IterableDataset:
        """A rank's micro-batches from number `first` on, without end; each worker yields every n-th of them."""
        return _MicroBatches(self._order, self._reader, schedule, first, self._observed)


class _MicroBatches(IterableDataset):
    """Every worker computes its own share. A `UserError` is yielded as a value: torch would add a worker's traceback to
    it.
    """

    def __init__(
        self, order: TrainingOrder, reader: SampleReader, schedule: RankSchedule, first: int, observed: bool
    ) -> None:
        self._order, self._reader, self._schedule, self._first = order, reader, schedule, first
        self._observed = observed

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        planned = max(1, _PLANNED_SAMPLES // self._schedule.micro_batch)

        def plan(chunk: int) -> np.ndarray:
            numbers = self._first + offset + stride * (chunk * planned + np.arange(planned))
            return self._order.locate(self._schedule.samples(numbers).reshape(-1))

        following = plan(0)
        self._reader.prefetch(following, 0)
        taken = 0
        for chunk in itertools.count(1):
            samples, following = following, plan(chunk)
            self._reader.prefetch(following, chunk * len(samples))
            for place, micro_batch in enumerate(samples.reshape(planned, -1), start=(chunk - 1) * planned):
                number = self._first + offset + stride * place
                repeats = self._observed and self._schedule.begins_step(number)
                try:
                    batch = to_batch(self._reader.read(micro_batch, repeats=repeats))
                except UserError as error:
                    yield error
                    return
                taken += len(micro_batch)
                self._reader.advance(taken)
                yield batch
