"""Reads variants from files: VCF, or tables of places and alleles, which may contain sequences. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.alleles import Allele, BasesOf
from caduceus.evaluate.columns import PARQUET, TEXT_TABLES, Columns, ending, read_columns
from caduceus.evaluate.vcf import Vcf, read_vcf
from caduceus.evaluate.windows import Windows, checked_bases
from caduceus.patience import is_directory, is_file
from caduceus.tables import is_missing

CONTIG = ("chrom", "chr", "chromosome", "contig", "#chrom", "chr_hg38")
POS = ("pos", "position", "pos_hg38")
REF = ("ref", "reference", "allele1")
ALT = ("alt", "alternate", "allele2")
_SEQUENCES = ("sequence", "sequences")


@dataclass(frozen=True)
class VariantSource:
    """Where variants come from: a VCF, or a CSV, TSV or parquet of chrom, pos (from 1), ref and alt.

    genome: the genome of the variants. A table without it has a column `sequence`, the window of each variant, and
    `start`, the position of its first base, from 0. mismatch: one of `alleles.MISMATCHES`.
    """

    input: str | Path
    genome: str | Path | None = None
    aliases: str | Path | None = None
    ref_mismatch: str = "refuse"
    allow_unknown_contigs: bool = False

    def read(self) -> "VariantFile":
        """All alleles, and the genome or sequences. Raises `UserError` where there is no allele, or the files are not
        sound.
        """
        if not is_file(self.input):
            what = "is a folder; give a file of variants" if is_directory(self.input) else "no such file"
            raise UserError(f"{self.input}: {what}")
        kind = ending(self.input)
        if kind == ".vcf":
            vcf = read_vcf(self.input)
            rows = [(row, record, alt) for row, record in enumerate(vcf.records) for alt in record.alts or ["."]]
            alleles = [
                Allele(record.contig, record.pos, record.ref, alt, f"{vcf.path}:{record.line}")
                for _, record, alt in rows
            ]
            found = VariantFile(alleles, [row for row, *_ in rows], self._genome(), vcf, None)
        elif kind in (*TEXT_TABLES, *PARQUET):
            columns = read_columns(self.input)
            genome = self._genome() if self.genome is not None else OwnSequences.of(columns)
            alleles, rows = _alleles(columns, genome)
            found = VariantFile(alleles, rows, genome, None, columns)
        else:
            known = ", ".join([".vcf", *TEXT_TABLES, *PARQUET])
            raise UserError(f"{self.input}: its ending does not say what it holds; known are {known} (also with .gz)")
        if not found.alleles:
            raise UserError(f"{self.input}: holds no variant")
        return found

    def _genome(self) -> Windows:
        if self.genome is None:
            raise UserError(f"{self.input}: names places of a genome; give its file with --genome")
        return Windows(self.genome, self.aliases)


@dataclass(frozen=True)
class VariantFile:
    """The `alleles` of a file in its order, the row number of each, and the file itself."""

    alleles: list[Allele]
    rows: list[int]
    genome: BasesOf
    vcf: Vcf | None
    columns: Columns | None

    @property
    def source(self) -> Path:
        """The file's path."""
        return self.columns.path if self.vcf is None else self.vcf.path


class OwnSequences:
    """The windows that the rows of a table contain; the number of a row takes the place of a contig."""

    def __init__(self, sequences: list[np.ndarray], starts: list[int]) -> None:
        self.sequences, self.starts = sequences, starts
        self.contigs = {
            str(row): start + len(bases) for row, (bases, start) in enumerate(zip(sequences, starts, strict=True))
        }

    @classmethod
    def of(cls, columns: Columns) -> "OwnSequences":
        """The sequences in a table's columns `sequence` and `start`."""
        if not any(columns.has(name) for name in _SEQUENCES):
            raise UserError(f"{columns.path}: give the genome with --genome, or a column 'sequence' of windows")
        texts = columns.values[columns.find(*_SEQUENCES, what="the windows")]
        sequences = [
            checked_bases("" if text is None else str(text), place)
            for text, place in zip(texts, columns.places, strict=True)
        ]
        return cls(sequences, whole_numbers(columns, ("start",), "the first base of each window, from 0"))

    def find(self, name: str) -> str:
        """A row is its own contig."""
        return name

    def bounds(self, contig: str) -> tuple[int, int]:
        """First base and length of a row's window."""
        return self.starts[int(contig)], len(self.sequences[int(contig)])

    def read(self, contig: str, start: int, end: int) -> np.ndarray:
        """Read like `Windows`: beyond the window there is N."""
        bases, first = self.sequences[int(contig)], self.starts[int(contig)]
        read = np.full(end - start, ord("N"), np.uint8)
        inside = slice(max(start - first, 0), max(end - first, 0))
        part = bases[inside]
        offset = max(first - start, 0)
        read[offset : offset + len(part)] = part
        return read


def _alleles(columns: Columns, genome: BasesOf) -> tuple[list[Allele], list[int]]:
    """The alleles of a table and the row of each; a row has several where ALT lists them with commas."""
    refs, alts = (columns.values[columns.find(*names, what=what)] for names, what in ((REF, "REF"), (ALT, "ALT")))
    positions = whole_numbers(columns, POS, "the place, from 1")
    if isinstance(genome, OwnSequences):
        contigs: list[Any] = [str(row) for row in range(len(columns))]
    else:
        contigs = columns.values[columns.find(*CONTIG, what="the contig")]
    found, rows = [], []
    for row, place in enumerate(columns.places):
        for alt in _allele(alts[row]).split(","):
            found.append(Allele(str(contigs[row]), positions[row], _allele(refs[row]), alt.strip(), place))
            rows.append(row)
    return found, rows


def _allele(value: Any) -> str:
    return "." if value is None or is_missing(str(value)) else str(value).strip()


def whole_numbers(columns: Columns, names: tuple[str, ...], what: str) -> list[int]:
    """The column with one of the names, as whole numbers of at least 0. Raises `UserError` for other values."""
    name = columns.find(*names, what=what)
    numbers = []
    for value, place in zip(columns.values[name], columns.places, strict=True):
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -1
        if number < 0 or (isinstance(value, float) and value != number):
            raise UserError(f"{place}: {name} must be a whole number in plain digits, got {str(value)[:40]!r}")
        numbers.append(number)
    return numbers
