"""Tables of variants with the sequences of both alleles, or with places of a genome from which these are made.

Rows are read when they are needed, as a benchmark's sequences may exceed the memory. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.columns import PARQUET, Columns, ending, package, read_columns
from caduceus.evaluate.sequences import alternative_window
from caduceus.evaluate.variant_inputs import ALT, CONTIG, POS, REF, whole_numbers
from caduceus.evaluate.windows import Windows, allele_bases, checked_bases

_REF_SEQUENCE, _ALT_SEQUENCE = "ref_forward_sequence", "alt_forward_sequence"


@dataclass(frozen=True)
class Pair:
    """The sequences with REF and with ALT, upper-case ASCII, and the first position at which they differ."""

    ref: np.ndarray
    alt: np.ndarray
    place: int


class PairTable:
    """A table with columns `ref_forward_sequence` and `alt_forward_sequence`, or with chrom, pos (from 1), ref and alt.

    In the latter case the sequences are read from `genome`, with `length` bases; the variant begins at base length //
    2.
    """

    def __init__(self, path: str | Path, genome: str | Path | None = None, length: int = 131_072) -> None:
        self.path, self.length = Path(path), length
        self._texts: _Texts | None = None
        if _has_sequences(self.path):
            self._texts = _Texts(self.path)
            self.columns = self._texts.others
        else:
            self.columns = read_columns(self.path)
            if genome is None:
                raise UserError(f"{path}: has no column {_REF_SEQUENCE!r}; give the genome of its places with --genome")
            self._windows = Windows(genome)
            self._starts = [position - 1 for position in whole_numbers(self.columns, POS, "the place, from 1")]
            self._contigs, self._refs, self._alts = (
                [str(value) for value in self.columns.values[self.columns.find(*names, what=what)]]
                for names, what in ((CONTIG, "the contig"), (REF, "REF"), (ALT, "ALT"))
            )

    def __len__(self) -> int:
        return len(self.columns)

    def read(self, row: int) -> Pair:
        """The pair of a row. Raises `UserError` where the alleles do not differ, or REF differs from the genome."""
        place = self.columns.places[row]
        if self._texts is not None:
            ref, alt = (checked_bases(text, place) for text in self._texts.read(row))
        else:
            ref, alt = self._of_genome(row, place)
        shorter = min(len(ref), len(alt))
        middle = shorter // 2
        differ = np.flatnonzero(ref[:shorter] != alt[:shorter])
        if not len(differ):
            raise UserError(f"{place}: the sequences of REF and ALT do not differ")
        return Pair(ref, alt, middle if middle in differ else int(differ[0]))

    def _of_genome(self, row: int, place: str) -> tuple[np.ndarray, np.ndarray]:
        contig = self._windows.require(self._contigs[row], place, "it may be another genome")
        start = self._starts[row]
        first = start - self.length // 2
        ref = self._windows.read(contig, first, first + self.length)
        there = ref[self.length // 2 :][: len(self._refs[row])].tobytes().decode()
        if there != allele_bases(self._refs[row]):
            raise UserError(
                f"{place}: REF is {self._refs[row][:20]}, but the genome has {there[:20]} there; it may be for another "
                "assembly"
            )
        checked_bases(self._alts[row], f"{place}: ALT")
        alt = alternative_window(self._windows, contig, start, self._refs[row], self._alts[row], self.length)
        return ref, alt

    def numbers(self, name: str) -> np.ndarray | None:
        """A column of numbers, float64; None where the table has no such column."""
        if not self.columns.has(name):
            return None
        values = self.columns.values[self.columns.find(name, what=name)]
        found = []
        for value, place in zip(values, self.columns.places, strict=True):
            try:
                found.append(float(value))
            except (TypeError, ValueError):
                raise UserError(f"{place}: {name} must be a number, got {str(value)[:40]!r}") from None
        return np.array(found)

    def texts(self, name: str) -> list[str] | None:
        """A column of text; None where the table has no such column."""
        if not self.columns.has(name):
            return None
        return [str(value) for value in self.columns.values[self.columns.find(name, what=name)]]


def binary_labels(columns: Columns, name: str = "label") -> np.ndarray:
    """A column of 0 and 1, or false and true, as (n,) bool. Raises `UserError`, which names the place, for other
    values.
    """
    known = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
    found = []
    values = columns.values[columns.find(name, f"{name}s", what="the labels")]
    for value, place in zip(values, columns.places, strict=True):
        word = str(value).strip().lower()
        if word not in known:
            raise UserError(f"{place}: the label must be 0 or 1, got {str(value)[:40]!r}")
        found.append(known[word])
    labels = np.array(found)
    if labels.all() or not labels.any():
        raise UserError(f"{columns.path}: all labels are {int(labels[0])}; there are no two classes to compare")
    return labels


def _has_sequences(path: Path) -> bool:
    if ending(path) in PARQUET:
        parquet = package("pyarrow.parquet")
        try:
            return _REF_SEQUENCE in parquet.read_schema(path).names
        except (OSError, package("pyarrow").ArrowException) as error:
            raise UserError(f"{path}: not readable as parquet ({' '.join(str(error).split())[:200]})") from None
    return read_columns(path).has(_REF_SEQUENCE)


class _Texts:
    """The two columns of sequences; of a parquet it reads one row group at a time, a text table as a whole."""

    def __init__(self, path: Path) -> None:
        self.file: Any = None
        if ending(path) not in PARQUET:
            self.others = read_columns(path)
            self._held: tuple[int, Sequence[str], Sequence[str]] = (0, *self._both(self.others.values))
            self._ends = [len(self.others)]
            return
        self.file = package("pyarrow.parquet").ParquetFile(path)
        schema = self.file.schema_arrow.names
        values = self.file.read([name for name in schema if name not in (_REF_SEQUENCE, _ALT_SEQUENCE)]).to_pydict()
        count = self.file.metadata.num_rows
        if not count:
            raise UserError(f"{path}: the table has no row")
        if _ALT_SEQUENCE not in schema:
            raise UserError(f"{path}: no column {_ALT_SEQUENCE!r} beside {_REF_SEQUENCE!r}")
        self.others = Columns(path, values, [f"{path}: row {row + 1}" for row in range(count)])
        groups = range(self.file.num_row_groups)
        self._ends = list(np.cumsum([self.file.metadata.row_group(group).num_rows for group in groups]))
        self._held = (-1, [], [])

    @staticmethod
    def _both(values: dict[str, list[Any]]) -> tuple[list[str], list[str]]:
        return values[_REF_SEQUENCE], values[_ALT_SEQUENCE]

    def read(self, row: int) -> tuple[str, str]:
        """The texts of REF and ALT of a row."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        if self._held[0] != group:
            table = self.file.read_row_group(group, [_REF_SEQUENCE, _ALT_SEQUENCE]).to_pydict()
            self._held = (group, *self._both(table))
        first = self._ends[group - 1] if group else 0
        return str(self._held[1][row - first]), str(self._held[2][row - first])
