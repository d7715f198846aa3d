"""Samples: where the g-th one lies (closed form), and its tokens and labels (one positional read). Imports no torch."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from caduceus.config import DataConfig
from caduceus.data.dataset import Dataset
from caduceus.data.masking import Masking, mask_bases, shift_bases, weigh_repeats
from caduceus.data.order import EpochOrder, Mixture, Purpose, key, permute
from caduceus.data.reader import ShardFiles
from caduceus.data.shards import STRAND_SYMBOLS
from caduceus.errors import UserError

SAMPLE_DTYPE = np.dtype(
    [
        ("g", "<i8"),  # sample number
        ("window", "<i8"),  # row of the crop table's windows
        ("begin", "<i8"),  # first base of the crop in its window, on the forward strand
        ("strand", "u1"),  # that the sample shows: 0 is +, 1 is -
        ("mask_key", "<u8"),
    ]
)


class TrainingOrder:
    """The endless sequence of training samples. Pure function of the dataset, the seed and the sample number."""

    def __init__(self, dataset: Dataset, seed: int, both_strands: bool, shuffle_block: int = 0) -> None:
        self._crops = dataset.crops
        self._seed = seed
        self._both_strands = both_strands
        self.mixture = Mixture([source.weight for source in dataset.sources], seed)
        self.epochs = EpochOrder(self._crops.crops_of_shard, self._crops.shards_of_source, seed, shuffle_block)

    def locate(self, g: np.ndarray) -> np.ndarray:
        """Samples g (n,) int64 -> (n,) SAMPLE_DTYPE."""
        source, k = self.mixture.locate(g)
        return self._samples(g, self.epochs.locate(source, k))

    def _samples(self, g: np.ndarray, crops: np.ndarray) -> np.ndarray:
        samples = np.empty(len(g), SAMPLE_DTYPE)
        samples["g"] = g
        samples["window"], samples["begin"] = self._crops.locate(crops)
        samples["strand"] = key(self._seed, Purpose.STRAND, g) >> np.uint64(63) if self._both_strands else 0
        samples["mask_key"] = key(self._seed, Purpose.MASK, g)
        return samples


def validation_samples(dataset: Dataset, limit: int) -> list[np.ndarray]:
    """At most `limit` samples of each source, (n,) SAMPLE_DTYPE, forward strand.

    Choice and masks are keyed by the genome and the place of the crop alone, so every run has the same ones.
    """
    crops = dataset.crops
    sizes = EpochOrder(crops.crops_of_shard, crops.shards_of_source, seed=0).sizes
    chosen = []
    for source, first, size in zip(dataset.sources, np.cumsum(sizes) - sizes, sizes, strict=True):
        count = min(limit, int(size))
        draw = key(Purpose.VALIDATION, _name_key(source.species, source.sha256))
        samples = np.zeros(count, SAMPLE_DTYPE)
        samples["g"] = np.arange(count)
        numbers = first + np.sort(permute(np.arange(count), int(size), draw))
        samples["window"], samples["begin"] = crops.locate(numbers)
        windows = crops.windows[samples["window"]]
        contigs = np.array([_name_key(source.species, contig) for contig in source.table.contigs], np.uint64)
        start = windows["start"] + samples["begin"].astype(np.uint64)
        samples["mask_key"] = key(Purpose.MASK, contigs[windows["contig"]], start)
        chosen.append(samples)
    return chosen


def _name_key(*names: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:8], "little")


@dataclass
class SampleArrays:
    """Tokens of B samples: `input_ids`, `labels` (B, L) uint8, `loss_weights` (B, L) float32 or None, `g` (B,)."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray | None
    g: np.ndarray


class SampleReader:
    """Reads samples, or the slice `positions` of each, for peers that share a sequence. Safe to pickle and to fork."""

    def __init__(self, dataset: Dataset, data: DataConfig, positions: tuple[int, int] | None = None) -> None:
        self._dataset = dataset
        self._crops = dataset.crops
        self._files = ShardFiles(self._crops.shards)
        self._first, end = positions or (0, data.seq_len)
        self._length = end - self._first
        self._next_base = data.objective == "next_base"
        self._end = min(end + self._next_base, data.seq_len)  # the last label of a slice is the next slice's base
        self._masking = Masking.of(data.mask_prob, data.mask_token_prob, data.random_token_prob)
        self._repeat_weight = data.repeat_weight

    def read(self, samples: np.ndarray) -> SampleArrays:
        """Tokens of samples (B,) SAMPLE_DTYPE."""
        bases, mirrored = self._read_bases(samples)
        if self._next_base:
            input_ids, labels, invalid = shift_bases(bases, mirrored, self._length)
        else:
            keys = samples["mask_key"].copy()  # out of the packed record, as the kernel needs it
            input_ids, labels, invalid = mask_bases(bases, mirrored, keys, self._first, self._masking)
        if invalid.any():
            raise UserError(f"{self._place(samples[invalid.argmax()])}: bytes that are no bases; the shard is damaged")
        weights = None
        if self._repeat_weight != 1:
            weights = weigh_repeats(bases, mirrored, self._length, int(self._next_base), self._repeat_weight)
        return SampleArrays(input_ids, labels, weights, samples["g"].copy())

    def describe(self, sample: np.void) -> dict[str, Any]:
        """Where a sample lies: species, contig, start, end (0-based half-open, forward strand) and strand."""
        window = self._crops.windows[sample["window"]]
        source = self._dataset.sources[self._crops.window_source[sample["window"]]]
        start = int(window["start"]) + int(sample["begin"])
        return {
            "species": source.species,
            "contig": source.table.contigs[window["contig"]],
            "start": start,
            "end": start + self._crops.seq_len,
            "strand": STRAND_SYMBOLS[sample["strand"]],
        }

    def _read_bases(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored bases (B, n) uint8, and which rows show their reverse complement (B,) bool."""
        windows = self._crops.windows[samples["window"]]
        count = self._end - self._first
        from_left = samples["begin"] + self._first
        from_right = samples["begin"] + self._crops.seq_len - self._end
        forward = np.where(samples["strand"] == 1, from_right, from_left)
        stored = np.where(windows["strand"] == 1, windows["length"].astype(np.int64) - forward - count, forward)
        offsets = windows["offset"].astype(np.int64) + stored
        bases = np.empty((len(samples), count), np.uint8)
        for row, (shard, offset) in enumerate(zip(windows["shard"].tolist(), offsets.tolist(), strict=True)):
            self._files.read_into(shard, offset, bases[row])
        return bases, samples["strand"] != windows["strand"]

    def _place(self, sample: np.void) -> str:
        where = self.describe(sample)
        shard = self._crops.shards[self._crops.windows[sample["window"]]["shard"]]
        return f"{shard}: {where['species']} {where['contig']}:{where['start']}-{where['end']}"
