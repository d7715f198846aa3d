"""Windows of a species and split: from its shards' indexes, or mapped from the dataset's table. Imports no torch.

A table is two .npy files for each split of a dataset: one has a row for each window, the other for each run, of all
species in the manifest's order. The file is stored by rows, not by columns, so that a sample needs one page of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.data.format import ShardIndex
from caduceus.errors import UserError
from caduceus.patience import patiently

WINDOW_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # row of the table's shard list
        ("offset", "<u8"),  # of the first stored base, in bytes from the start of the tar
        ("length", "<u4"),  # bases
        ("contig", "<u4"),  # row of the species' contig table
        ("start", "<u8"),  # on the forward strand, 0-based
        ("strand", "u1"),  # of the stored bases: 0 is +, 1 is -
        ("acgt", "<u4"),  # count of A, C, G and T in either case
        ("lower", "<u4"),  # count of lower-case bases, also of those that are not ACGT
        ("crc32", "<u4"),  # of the stored bases
        ("may_be_padded", "?"),  # whether N at its end may come from `--tail pad` and not from the genome
    ]
)
WINDOW_RUN_DTYPE = np.dtype(
    [
        ("window", "<u4"),  # row of the window table
        ("start", "<u4"),  # first position of the run in the window, on the forward strand
        ("length", "<u4"),
    ]
)


def windows_of(indexes: Iterable[ShardIndex], padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Windows (WINDOW_DTYPE) and runs (WINDOW_RUN_DTYPE) of a species' shards, each window once, in shard order."""
    samples, runs, sample_count = [np.zeros(0, WINDOW_DTYPE)], [np.zeros(0, WINDOW_RUN_DTYPE)], 0
    for shard, index in enumerate(indexes):
        stored = np.zeros(len(index.samples), WINDOW_DTYPE)
        for name in ("offset", "length", "contig", "start", "strand", "acgt", "lower", "crc32"):
            stored[name] = index.samples[name]
        stored["may_be_padded"] = padded & (index.samples["acgt"] < index.samples["length"])
        stored["shard"] = shard
        runs_here = np.zeros(len(index.runs), WINDOW_RUN_DTYPE)
        for name, column in (("window", "sample"), ("start", "start"), ("length", "length")):
            runs_here[name] = index.runs[column]
        runs_here["window"] += sample_count
        sample_count += len(stored)
        samples.append(stored)
        runs.append(runs_here)
    joined = np.concatenate(samples)
    rows = _one_row_per_window(joined)
    return joined[rows], _forward_runs(joined, np.concatenate(runs), rows)


def require_fit(index: ShardIndex, path: Path, entry: dict[str, Any], contigs: int) -> None:
    """Raise `UserError` where an index does not describe the shard that is `entry` in the manifest."""
    samples, runs = index.samples, index.runs
    fits = (
        len(samples) == entry["samples"]
        and np.all(samples["offset"] + samples["length"] <= entry["bytes"])
        and np.all(samples["contig"] < contigs)
        and np.all(samples["strand"] <= 1)
        and np.all(runs["sample"] < len(samples))
        and np.all(runs["start"].astype(np.int64) + runs["length"] <= samples["length"][runs["sample"]])
    )
    if not fits:
        raise UserError(f"{path}: the index does not describe {entry['name']}; restore it or shard again")


def _one_row_per_window(samples: np.ndarray) -> np.ndarray:
    """The rows of `samples` with each window once, on the forward strand where both are stored, in tar order."""
    order = np.lexsort((samples["strand"], samples["length"], samples["start"], samples["contig"]))
    place = samples[["contig", "start", "length"]][order]
    first = np.ones(len(order), bool)
    first[1:] = place[1:] != place[:-1]
    return np.sort(order[first])


def _forward_runs(samples: np.ndarray, runs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The runs of the chosen rows, renumbered and in forward coordinates."""
    window_of_sample = np.full(len(samples), -1, np.int64)
    window_of_sample[rows] = np.arange(len(rows))
    runs = runs[window_of_sample[runs["window"]] >= 0]
    sample = samples[runs["window"]]
    mirrored = sample["length"] - runs["start"] - runs["length"]
    runs["start"] = np.where(sample["strand"] == 1, mirrored, runs["start"])
    runs["window"] = window_of_sample[runs["window"]]
    return runs


@dataclass(frozen=True)
class SplitTable:
    """All windows of a split of a dataset, mapped into memory, so that the processes of a node share the pages.

    `windows` (WINDOW_DTYPE) and `runs` (WINDOW_RUN_DTYPE); the numbers of shards and windows in them count over all
    species. `species`: the names; `first_shard`, `first_window`, `first_run` (S + 1,): where each species begins;
    `bases` (S,).
    """

    windows: np.ndarray
    runs: np.ndarray
    species: tuple[str, ...]
    first_shard: Sequence[int]
    first_window: Sequence[int]
    first_run: Sequence[int]
    bases: Sequence[int]

    @classmethod
    def open(cls, paths: tuple[Path, Path], table: dict[str, Any], splits: Sequence[tuple[str, int]]) -> "SplitTable":
        """Map the files of windows and runs that the manifest's row `table` describes.

        `splits`: the name and the number of shards of each species that has the split. Raises `UserError` where the
        files do not match the row; only their sizes are compared, not their content.
        """
        arrays = []
        for path, kind, dtype in zip(paths, ("windows", "runs"), (WINDOW_DTYPE, WINDOW_RUN_DTYPE), strict=True):
            try:
                mode = "r" if sum(table["counts"][kind]) else None
                array = patiently(partial(np.load, path, mmap_mode=mode, allow_pickle=False))
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); --rebuild-index makes it again") from None
            if array.dtype != dtype or array.shape != (sum(table["counts"][kind]),):
                raise UserError(f"{path}: is not the table that the manifest names; --rebuild-index makes it again")
            arrays.append(array)
        counts = table["counts"]
        return cls(
            *arrays,
            species=tuple(name for name, _ in splits),
            first_shard=_firsts([shards for _, shards in splits]),
            first_window=_firsts(counts["windows"]),
            first_run=_firsts(counts["runs"]),
            bases=counts["bases"],
        )


@dataclass(frozen=True)
class LoadedWindows:
    """The windows (WINDOW_DTYPE) and runs (WINDOW_RUN_DTYPE) of one species and split, in memory."""

    windows: np.ndarray
    runs: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return self.windows

    @property
    def bases(self) -> int:
        return int(self.windows["length"].sum(dtype=np.int64))


@dataclass(frozen=True)
class MappedWindows:
    """The windows of species number `number` in a `SplitTable`."""

    whole: SplitTable
    number: int

    @property
    def bases(self) -> int:
        return self.whole.bases[self.number]

    @property
    def rows(self) -> np.ndarray:
        """The windows as they are mapped, with shard numbers of the whole table."""
        return self.whole.windows[self.whole.first_window[self.number] : self.whole.first_window[self.number + 1]]

    @cached_property
    def windows(self) -> np.ndarray:
        """A copy of the windows, with the species' own shard numbers."""
        rows = np.array(self.rows)
        rows["shard"] -= self.whole.first_shard[self.number]
        return rows

    @cached_property
    def runs(self) -> np.ndarray:
        """A copy of the runs, with the species' own window numbers."""
        first = self.whole.first_window[self.number]
        runs = np.array(self.whole.runs[self.whole.first_run[self.number] : self.whole.first_run[self.number + 1]])
        runs["window"] -= first
        return runs


def _firsts(counts: Sequence[int]) -> list[int]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64).tolist()
