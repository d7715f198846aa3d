"""Values of many tracks for each bin of long sequences, read when needed, as they may exceed the memory.

It reads a folder in the form of the Long Range Benchmark's CAGE task: `sequences_coordinates.csv` with chrom, start,
stop, split and npy_idx, and `targets-SPLIT-FIRST-LAST.npz` with arrays `target-SPLIT-INDEX` (1, bins, tracks). Imports
no torch.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.columns import read_columns
from caduceus.evaluate.labelled import Labelled, Task
from caduceus.evaluate.windows import Windows
from data_prep.progress import Progress

COORDINATES = "sequences_coordinates.csv"
_TARGETS = re.compile(r"targets-(\w+)-(\d+)-(\d+)\.npz")
_WORDS = {"train": ("train",), "valid": ("validation", "valid"), "test": ("test",)}
_MOST_N = 0.005
"""Sequences with at least this share of N are left out, as in the publication."""


class _Lazy(Sequence):
    """A sequence of the results of `read` for each of `rows`, computed on access."""

    def __init__(self, rows: np.ndarray, read: Callable[[int], np.ndarray]) -> None:
        self.rows, self.read = rows, read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.read(int(self.rows[place]))


@dataclass(frozen=True)
class BinnedData(Labelled):
    """Labels are (bins, tracks) for each sequence; all sequences have `length` bases."""

    length: int = 0

    @property
    def sizes(self) -> list[int]:
        return [self.length] * len(self)

    def pick(self, rows: np.ndarray) -> "BinnedData":
        bases, labels = (_Lazy(of.rows[rows], of.read) for of in (self.bases, self.labels))
        return BinnedData(bases, labels, self.length)


@dataclass(frozen=True)
class _Shard:
    """A file of targets, opened once per process."""

    path: Path

    @cached_property
    def arrays(self) -> Any:
        return np.load(self.path, allow_pickle=False)

    def read(self, name: str) -> np.ndarray:
        try:
            return self.arrays[name]
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({' '.join(str(error).split())[:200]})") from None


@dataclass(frozen=True)
class BinnedTable:
    """The sequences of one split. path: the table of coordinates, which count from 1. genome: the genome of the
    sequences.

    Labels are log(1 + value), float32. notes: lines about what was left out.
    """

    path: str
    split: str
    genome: str

    @cached_property
    def _windows(self) -> Windows:
        return Windows(self.genome)

    @cached_property
    def _rows(self) -> tuple[list[tuple[str, int, int, str, _Shard]], list[str]]:
        """(contig, start, end, name of the target, its file) of each sequence, and notes."""
        columns = read_columns(self.path)
        chroms, starts, stops, splits, indices = (
            columns.values[columns.find(name, what="the sequences of the task")]
            for name in ("chrom", "start", "stop", "split", "npy_idx")
        )
        shards, found, counts = list(self._shards()), [], {"contigs that the genome lacks": 0, "files not there": 0}
        for row, place in enumerate(columns.places):
            if splits[row] not in _WORDS[self.split]:
                continue
            start, stop, index = (_whole(of[row], place) for of in (starts, stops, indices))
            contig = self._windows.find(chroms[row])
            shard = next(((word, shard) for word, first, last, shard in shards if first <= index <= last), None)
            if contig is None or shard is None:
                counts["contigs that the genome lacks" if contig is None else "files not there"] += 1
                continue
            if not 1 <= start < stop <= self._windows.contigs[contig] + 1:
                raise UserError(
                    f"{place}: ends beyond {contig} with {self._windows.contigs[contig]:,} bases; it may be for "
                    "another assembly"
                )
            found.append((contig, start - 1, stop - 1, f"target-{shard[0]}-{index}", shard[1]))
        kept = [row for row in found if np.mean(self._windows.read(*row[:3]) == ord("N")) < _MOST_N]
        counts["stretches of N"] = len(found) - len(kept)
        notes = [
            f"{self.path}: {count:,} sequences of {self.split} lie on {what}, and are left out"
            for what, count in counts.items()
            if count
        ]
        if found and not kept:
            raise UserError(f"{self.path}: every sequence of {self.split} has 0.5 % N or more; another genome?")
        return kept, notes

    def _shards(self) -> Iterator[tuple[str, int, int, _Shard]]:
        folder = Path(self.path).parent
        for path in sorted([*folder.glob("*.npz"), *folder.glob("*/*.npz")]):
            named = _TARGETS.fullmatch(path.name)
            if named and named[1] in _WORDS[self.split]:
                yield named[1], int(named[2]), int(named[3]), _Shard(path)

    @property
    def notes(self) -> list[str]:
        return self._rows[1]

    def __len__(self) -> int:
        return len(self._rows[0])

    def bases(self, row: int) -> np.ndarray:
        """The sequence of a row, upper-case ASCII."""
        return self._windows.read(*self._rows[0][row][:3])

    def values(self, row: int) -> np.ndarray:
        """The values (bins, tracks) of a row. Raises `UserError`, which names the file, where they do not fit the first
        row.
        """
        contig, start, end, name, shard = self._rows[0][row]
        values = shard.read(name)
        shape = values.shape[1:] if values.ndim == 3 and len(values) == 1 else values.shape
        if len(shape) != 2 or (end - start) % shape[0] or not (np.isfinite(values).all() and values.min() >= 0):
            raise UserError(
                f"{shard.path}: {name} should hold values from 0 on for bins of {contig}:{start + 1}-{end}, and has "
                f"the shape {values.shape}"
            )
        return np.log1p(values.reshape(shape), dtype=np.float32)

    def task(self, kind: str) -> Task:
        """Regression of every track in every bin, scaled by the mean and spread of each track."""
        if not len(self):
            raise UserError(f"{self.path}: no sequence of {self.split} is left")
        first = self.values(0)
        sums, count = np.zeros((2, first.shape[1])), 0
        with Progress("reading labels", len(self), "sequences") as progress:
            for row in range(len(self)):
                values = self.values(row).astype(np.float64)
                if values.shape != first.shape:
                    name, shard = self._rows[0][row][3:]
                    raise UserError(f"{shard.path}: {name} has the shape {values.shape}, and the first {first.shape}")
                sums += [values.sum(0), (values**2).sum(0)]
                count += len(values)
                progress.add(1)
        mean = sums[0] / count
        spread = np.sqrt(np.maximum(sums[1] / count - mean**2, 0))
        if not spread.any():
            raise UserError(f"{self.path}: all values are the same; there is nothing to learn")
        names = tuple(str(number + 1) for number in range(first.shape[1]))
        spreads = tuple(np.where(spread > 0, spread, 1).tolist())
        _, start, end, *_ = self._rows[0][0]
        bin_ = (end - start) // len(first)
        return Task(None, tuple(mean.tolist()), spreads, per_base=True, values=names, bin=bin_)

    def labelled(self, task: Task) -> BinnedData:
        """The sequences with their labels, each read on access."""
        rows = np.arange(len(self))
        lengths = {end - start for _, start, end, *_ in self._rows[0]}
        if len(lengths) > 1:
            raise UserError(
                f"{self.path}: sequences of {min(lengths):,} and of {max(lengths):,} bases; all must have the same "
                "number"
            )
        return BinnedData(_Lazy(rows, self.bases), _Lazy(rows, self.values), *lengths)


def _whole(text: Any, place: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{place}: start, stop and npy_idx must be whole numbers, got {str(text)[:40]!r}") from None
