"""The sequences to run, from a FASTA, a BED or VCF with its genome, a table, or shards. Imports no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caduceus.bed import read_bed
from caduceus.data.format import MANIFEST, SPLITS
from caduceus.data.genome import ShardedGenome
from caduceus.errors import UserError
from caduceus.evaluate.columns import PARQUET, TEXT_TABLES, ending, read_columns
from caduceus.evaluate.vcf import read_vcf
from caduceus.evaluate.windows import Windows, allele_bases, checked_bases, upper_case
from caduceus.files import sha256_of
from caduceus.patience import is_directory, is_file

FASTA = (".fa", ".fasta", ".fna", ".ffn")
GENOMES = (*FASTA, ".2bit")
"""Endings of the files that data_prep opens as a genome, whatever their format; `FASTA` may have labels in headers."""
BED = (".bed", ".narrowpeak", ".broadpeak", ".bed3", ".bed6")
VCF = (".vcf",)
_NAME_COLUMNS = ("name", "id")


@dataclass(frozen=True)
class Item:
    """A sequence with its name and length; its bases are read when they are needed."""

    name: str
    length: int
    read: Callable[[], np.ndarray]
    """Upper-case ASCII, (length,) uint8."""


@dataclass(frozen=True)
class SequenceSource:
    """Where sequences come from: a file, whose ending tells its format, or a folder of shards.

    genome: for BED and VCF. window: the number of bases around the middle of a BED's row or the place of a VCF's
    variant, or the length into which windows of shards are cut; None takes rows and windows whole. column: that of the
    sequences in a table. split: that of shards.
    """

    input: str | Path
    genome: str | Path | None = None
    aliases: str | Path | None = None
    window: int | None = None
    column: str = "sequence"
    split: str = "valid"

    def sha256(self) -> str:
        """The sha256 of the file, or of the shards' manifest, which has theirs."""
        path = Path(self.input)
        return sha256_of(path / MANIFEST if is_directory(path) else path)

    def items(self) -> list[Item]:
        """All sequences, in the file's order. Raises `UserError` where there is none, or the files are not sound."""
        kind, is_folder = ending(self.input), is_directory(self.input)
        if not is_file(self.input) and not is_folder:
            raise UserError(f"{self.input}: no such file")
        if self.window is not None and self.window < 1:
            raise UserError(f"--window: must be at least 1, got {self.window}")
        if is_folder:
            found = _of_shards(self)
        elif kind in GENOMES:
            found = _of_fasta(Windows(self.input))
        elif kind in (*BED, *VCF):
            windows = self._windows()
            found = _of_bed(self, windows) if kind in BED else _of_vcf(self, windows)
        elif kind in (*TEXT_TABLES, *PARQUET):
            found = _of_table(self)
        else:
            known = ", ".join([*GENOMES, *BED, *VCF, *TEXT_TABLES, *PARQUET])
            raise UserError(f"{self.input}: its ending does not say what it holds; known are {known} (also with .gz)")
        items = list(found)
        if not items:
            which = f" of the split {self.split!r}" if is_folder else ""
            raise UserError(f"{self.input}: holds no sequence{which}")
        return items

    def _windows(self) -> Windows:
        if self.genome is None:
            raise UserError(f"{self.input}: names places of a genome; give its file with --genome")
        return Windows(self.genome, self.aliases)


def _of_fasta(windows: Windows) -> Iterator[Item]:
    for name, length in windows.contigs.items():
        if length:
            yield _region(windows, name, name, 0, length)


def _of_shards(source: SequenceSource) -> Iterator[Item]:
    if source.split not in SPLITS:
        raise UserError(f"--split: choose one of {', '.join(SPLITS)}, got {source.split!r}")
    genome = ShardedGenome(source.input)
    for species in genome.species:
        table = genome.table(species, source.split)
        for window in np.sort(table.windows, order=("contig", "start")):
            contig, start, length = table.contigs[window["contig"]], int(window["start"]), int(window["length"])
            for first in range(start, start + length, source.window or length):
                end = min(first + (source.window or length), start + length)
                yield _of_window(genome, species, contig, first, end)


def _of_window(genome: ShardedGenome, species: str, contig: str, start: int, end: int) -> Item:
    def read() -> np.ndarray:
        return upper_case(genome.read(species, contig, start, end))

    return Item(f"{species}/{contig}:{start}-{end}", end - start, read)


def _of_bed(source: SequenceSource, windows: Windows) -> Iterator[Item]:
    path = Path(source.input)
    for row in read_bed(path).rows:
        place = f"{path}:{row.line}"
        contig = windows.require(row.contig, place)
        start, end = row.start, row.end
        if end > windows.contigs[contig]:
            raise UserError(
                f"{place}: ends at {end:,}, beyond {contig} with {windows.contigs[contig]:,} bases; it may be for "
                "another assembly"
            )
        if source.window is not None:
            start = (start + end) // 2 - source.window // 2
            end = start + source.window
        yield _region(windows, row.name or f"{row.contig}:{row.start}-{row.end}", contig, start, end)


def _of_vcf(source: SequenceSource, windows: Windows) -> Iterator[Item]:
    if source.window is None:
        raise UserError(
            f"{source.input}: a VCF needs windows around its variants; give their number of bases with --window"
        )
    vcf = read_vcf(source.input)
    for record in vcf.records:
        place = f"{vcf.path}:{record.line}"
        contig = windows.require(record.contig, place)
        start = record.pos - 1 - source.window // 2
        there = windows.read(contig, record.pos - 1, record.pos - 1 + len(record.ref)).tobytes().decode()
        if there != allele_bases(record.ref):
            raise UserError(
                f"{place}: REF is {record.ref[:20]}, but the genome has {there[:20]} there; it may be for another "
                "assembly"
            )
        name = f"{record.contig}:{record.pos}:{record.ref}"
        yield _region(windows, f"{name}:ref", contig, start, start + source.window)
        for alt in record.alts:
            if set(allele_bases(alt)) <= set("ACGT"):
                yield _alternative(windows, f"{name}:{alt}", contig, record.pos - 1, record.ref, alt, source.window)


def _of_table(source: SequenceSource) -> Iterator[Item]:
    columns = read_columns(source.input)
    texts = columns.values[columns.find(source.column, what="the sequences (--column)")]
    name = next((columns.find(known, what="names") for known in _NAME_COLUMNS if columns.has(known)), None)
    names = columns.values[name] if name is not None else range(len(columns))
    for name, text, place in zip(names, texts, columns.places, strict=True):
        bases = checked_bases("" if text is None else str(text), place)
        yield Item(str(name), len(bases), lambda bases=bases: bases)


def _region(windows: Windows, name: str, contig: str, start: int, end: int) -> Item:
    return Item(name, end - start, lambda: windows.read(contig, start, end))


def _alternative(windows: Windows, name: str, contig: str, start: int, ref: str, alt: str, window: int) -> Item:
    return Item(name, window, lambda: alternative_window(windows, contig, start, ref, alt, window))


def alternative_window(windows: Windows, contig: str, start: int, ref: str, alt: str, window: int) -> np.ndarray:
    """The window in which `alt` replaces `ref`. `ref` begins at 0-based `start` on the contig, and at window // 2 in
    the window.
    """
    first = start - window // 2
    left = windows.read(contig, first, start)
    right = windows.read(contig, start + len(ref), start + len(ref) + window)
    return np.concatenate([left, np.frombuffer(allele_bases(alt).encode(), np.uint8), right])[:window]
