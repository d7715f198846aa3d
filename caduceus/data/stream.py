"""Training from tars without an index: a stream in the way of stock WebDataset, with weaker guarantees than shards.

The order depends on the number of ranks and workers, a restart draws the tars anew, and damage is noticed only where it
breaks the format of a tar or of its compression. In exchange any tar with bases in it can be used, local or remote.
"""

import itertools
import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from caduceus.alphabet import IS_ACGT_BYTE, IS_IUPAC_BYTE, IS_URACIL_BYTE
from caduceus.config import Config, DataConfig
from caduceus.data.batch import Batch, RankSchedule, to_batch
from caduceus.data.objective import Objective, SampleArrays
from caduceus.data.order import Purpose, key, permute
from caduceus.data.remote import log_commands, refuse_commands
from caduceus.data.samples import SAMPLE_DTYPE, mask_rates, resolve_strands
from caduceus.data.tars import Remark, TarFindings, read_members
from caduceus.errors import UserError

log = logging.getLogger(__name__)

SPECIES = "stream"
"""Takes the place of a species' name, which a stream does not know."""
_SHUFFLED_CROPS = 4096
_SHUFFLED_BASES = 64 << 20
"""Largest number of crops, and of bases, in the buffer from which a worker draws its crops."""


class StreamSamples:
    """The samples of a training loader with `data.mode=stream`."""

    substituted_are = "tars are damaged"

    def __init__(self, config: Config, positions: tuple[int, int] | None) -> None:
        self._data = config.data
        self._seed = config.train.seed
        self._both_strands = resolve_strands(config) == "both"
        self._urls = expand_urls(config.data.path, "data.path", config.data.allow_commands)
        rates = mask_rates(config)
        self._objective = Objective(config.data, config.model.vocabulary, positions, mask_rate=rates)
        self._observed = bool(config.monitor.every)

    def log(self) -> None:
        log_commands(self._urls)
        log.warning(
            "data: stream of %d tars without an index: batches depend on the number of ranks and workers, a restart "
            "draws the tars anew (samples may repeat or be missed), damage inside a tar's bases goes unseen, samples "
            "have no coordinates",
            len(self._urls),
        )

    def what_decides_the_order(self) -> dict[str, Any]:
        return {"urls": self._urls, "stream_key": self._data.stream_key}

    @property
    def species(self) -> tuple[str, ...]:
        return (SPECIES,)

    def species_rows(self, numbers: np.ndarray) -> np.ndarray:
        return np.zeros(len(numbers), np.int64)

    def describe(self, g: int) -> dict[str, Any]:
        return {"species": SPECIES, "sample": g}

    def epochs(self, g: int) -> dict[str, float]:
        """Nothing, as a stream does not know how long an epoch is."""
        return {}

    def micro_batches(self, schedule: RankSchedule, first: int) -> IterableDataset:
        """A rank's micro-batches from number `first` on, without end; each worker yields every n-th of them."""
        return _StreamMicroBatches(self, schedule, first)

    def tokens(self, crops: list[np.ndarray], g: np.ndarray, begins_step: bool) -> SampleArrays:
        """Tokens of B crops, each (seq_len,) uint8, as samples number g (B,) of a micro-batch, which may be its step's
        first.
        """
        samples = np.zeros(len(g), SAMPLE_DTYPE)
        samples["g"] = g
        samples["strand"] = key(self._seed, Purpose.STRAND, g) >> np.uint64(63) if self._both_strands else 0
        samples["mask_key"] = key(self._seed, Purpose.MASK, g)
        return tokens_of_crops(self._objective, np.stack(crops), samples, begins_step and self._observed)

    def crops(self, start: int, consumer: int, consumers: int, notes: list[str]) -> Iterator[np.ndarray]:
        """Shuffled crops for one worker of one rank, without end. Each damaged tar adds a line to `notes`."""
        urls = self._urls_of(start, consumer, consumers)
        crops = crops_of_tars(urls, self._data, notes, tars=len(set(self._urls)))
        seed = int(key(self._seed, Purpose.CROP, start, consumer)[0])
        size = max(1, min(_SHUFFLED_CROPS, _SHUFFLED_BASES // self._data.seq_len))
        return webdataset.shuffle(size, initial=size // 10, rng=random.Random(seed))(crops)

    def _urls_of(self, start: int, consumer: int, consumers: int) -> Iterator[str]:
        """Every `consumers`-th tar of an endless sequence, in which each pass over the tars has its own order."""
        for place in itertools.count(consumer, consumers):
            epoch, position = divmod(place, len(self._urls))
            keys = key(self._seed, Purpose.SHARDS, start, epoch)
            yield self._urls[permute(np.array([position]), len(self._urls), keys)[0]]


class _StreamMicroBatches(IterableDataset):
    def __init__(self, samples: StreamSamples, schedule: RankSchedule, first: int) -> None:
        self._samples, self._schedule, self._first = samples, schedule, first

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        consumer, consumers = self._schedule.rank * stride + offset, self._schedule.world * stride
        notes: list[str] = []
        crops = self._samples.crops(self._first * self._schedule.micro_batch, consumer, consumers, notes)
        try:
            for number in itertools.count(self._first + offset, stride):
                g = self._schedule.samples(np.array([number]))[0]
                arrays = self._samples.tokens(
                    list(itertools.islice(crops, len(g))), g, self._schedule.begins_step(number)
                )
                arrays.substituted = tuple(notes)
                notes.clear()
                yield to_batch(arrays)
        except UserError as error:
            yield error


class StreamValidation:
    """The first crops of `data.valid_path`, kept in memory; reads like a `SampleReader`."""

    def __init__(self, config: Config, positions: tuple[int, int] | None) -> None:
        data = config.data
        if data.valid_path is None:
            raise UserError("data.valid_path: needed to validate in stream mode; name its tars, or set valid.every=0")
        self._urls = expand_urls(data.valid_path, "data.valid_path", data.allow_commands)
        notes: list[str] = []
        crops = crops_of_tars(iter(self._urls), data, notes, tars=len(set(self._urls)))
        self._crops = np.stack(list(itertools.islice(crops, config.valid.samples)))
        crops.close()
        if damaged := [note for note in notes if not isinstance(note, Remark)]:
            raise UserError(f"data.valid_path: {damaged[0]}")
        self._remarks = list(dict.fromkeys(notes))
        self._objective = Objective(data, config.model.vocabulary, positions)
        self.samples = np.zeros(len(self._crops), SAMPLE_DTYPE)
        self.samples["g"] = np.arange(len(self._crops))
        self.samples["mask_key"] = key(Purpose.VALIDATION, self.samples["g"])

    def log(self) -> None:
        log_commands(self._urls)
        for remark in self._remarks:
            log.warning("data.valid_path: %s", remark)

    def describe(self, sample: np.void) -> dict[str, Any]:
        """What is known about a crop, without coordinates, which a stream does not have."""
        return {"species": SPECIES, "sample": int(sample["g"])}

    def read(self, samples: np.ndarray, repeats: bool = False) -> SampleArrays:
        return tokens_of_crops(self._objective, self._crops[samples["g"]], samples, repeats)


def expand_urls(path: Any, name: str, allow_commands: bool) -> list[str]:
    """The tars of a path or a list of paths, with {000..099} expanded as webdataset does; `name` is the key's."""
    entries = path if isinstance(path, list) else [path]
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise UserError(
            f"{name}: in stream mode give the address of tars, such as dir/{{000..099}}.tar, or a list of them"
        )
    try:
        urls = [url for entry in entries for url in webdataset.shardlists.expand_urls(entry)]
    except (AssertionError, ValueError) as error:  # raised for an unset variable, and for unmatched braces
        raise UserError(f"{name}: {error}") from None
    refuse_commands(urls, allow_commands, name)
    return urls


def crops_of_tars(urls: Iterator[str], data: DataConfig, notes: list[str], tars: int) -> Iterator[np.ndarray]:
    """The usable crops (seq_len,) uint8 of tars, in order.

    `notes` gets a line each time a damaged tar is read. Raises `UserError` once each of the `tars` different tars has
    been read, and none had a usable crop when it was last read.
    """
    fruitless: set[str] = set()
    for url in urls:
        findings, found = TarFindings(url), False
        try:
            for name, content in read_members(findings, data.stream_key):
                for crop in _crops_of_member(name, content, data, findings):
                    found = True
                    yield crop
        finally:
            notes.extend(line for line in (findings.line(), findings.remark()) if line is not None)
        if found:
            fruitless.discard(url)
            continue
        fruitless.add(url)
        if not findings.problems:
            notes.append(Remark(_fruitless(data, findings)))
        if len(fruitless) == tars:
            raise UserError(_no_crop(data, findings))


def _fruitless(data: DataConfig, findings: TarFindings) -> str:
    members = f"members named *.{data.stream_key} (data.stream_key){_other_files(findings)}"
    return f"{findings.address}: has no usable crop of {data.seq_len} bases in {members}"


def _other_files(findings: TarFindings) -> str:
    others = ", ".join(f".{extension}" for extension in sorted(findings.other_extensions))
    return f"; the files in this one end in {others}" if others else ""


def _no_crop(data: DataConfig, findings: TarFindings) -> str:
    problem = f" ({findings.line()})" if findings.problems else ""
    return (
        f"{findings.address}: neither this tar nor any other has a usable crop of {data.seq_len} bases in members "
        f"named *.{data.stream_key} (data.stream_key){_other_files(findings)}{problem}"
    )


def _crops_of_member(name: str, content: bytes, data: DataConfig, findings: TarFindings) -> Iterator[np.ndarray]:
    bases = np.frombuffer(content.strip(), np.uint8)
    if not IS_IUPAC_BYTE[bases].all():
        findings.add("members with bytes that are not bases are left out", name)
        return
    if IS_URACIL_BYTE[bases].any():
        findings.remarks["holds RNA (U): every U is read as T"] = None
        bases = np.where(IS_URACIL_BYTE[bases], bases - np.uint8(1), bases)  # T precedes U in either case
    for begin in range(0, len(bases) - data.seq_len + 1, data.seq_len):
        crop = bases[begin : begin + data.seq_len]
        if IS_ACGT_BYTE[crop].sum() >= max(1, data.min_acgt * data.seq_len - 1e-6):
            yield crop


def tokens_of_crops(
    objective: Objective, crops: np.ndarray, samples: np.ndarray, repeats: bool = False
) -> SampleArrays:
    """Tokens of whole forward crops (B, seq_len) uint8 on the strands that `samples` name, for `repeats` with the
    soft-masked bases.
    """
    mirrored = samples["strand"] == 1
    length = crops.shape[1]
    needed = np.empty((len(crops), objective.end - objective.first), np.uint8)
    needed[~mirrored] = crops[~mirrored, objective.first : objective.end]
    needed[mirrored] = crops[mirrored, length - objective.end : length - objective.first]
    return objective.tokens(needed, mirrored, samples, repeats)[0]
