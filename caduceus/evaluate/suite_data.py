"""Finds the data of benchmark tasks in a folder, and reads their usual layouts. Imports no torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caduceus.alphabet import reverse_complement
from caduceus.errors import UserError
from caduceus.evaluate.binned import COORDINATES, BinnedTable
from caduceus.evaluate.columns import PARQUET, TEXT_TABLES, ending, package, read_columns, write_columns
from caduceus.evaluate.labelled import LabelledTable
from caduceus.evaluate.sequences import FASTA
from caduceus.evaluate.variant_inputs import whole_numbers
from caduceus.evaluate.windows import Windows
from caduceus.patience import is_directory, is_file
from caduceus.tables import read_lines, refuse_line

SPLITS = {"train": ("train",), "valid": ("dev", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class TaskData:
    """The tables of a task, by split, and notes about them."""

    tables: dict[str, LabelledTable | BinnedTable]
    notes: list[str]


def find_task_data(folder: Path, names: list[str], converted: Path, genome: Path | None) -> TaskData | None:
    """The data of the task with one of these names below `folder`; None where there are none.

    Data in another form than a table of sequence and label are written as one to `converted`-SPLIT.tsv. genome: for
    tables of places.
    """
    place = next((folder / name for name in names if is_directory(folder / name)), None)
    if place is not None and is_file(place / COORDINATES):
        return _binned(place / COORDINATES, genome)
    notes: list[str] = []
    tables: dict[str, LabelledTable | BinnedTable] = {}
    for split, words in SPLITS.items():
        found = next(filter(None, (_split_of(place, word) for word in words)), None) if place else None
        table = _as_table(found, Path(f"{converted}-{split}.tsv"), genome, notes) if found else None
        if table is None and place is None:
            table = _of_joint_table(folder, words, names, Path(f"{converted}-{split}.tsv"))
        if table is not None:
            tables[split] = LabelledTable(table)
    return TaskData(tables, notes) if "train" in tables else None


def _binned(coordinates: Path, genome: Path | None) -> TaskData:
    if genome is None:
        raise UserError(f"{coordinates}: holds places of a genome; give its file with --genome")
    found = {split: BinnedTable(str(coordinates), split, str(genome)) for split in SPLITS}
    notes = [note for table in found.values() for note in table.notes]
    return TaskData({split: table for split, table in found.items() if len(table) or split == "train"}, notes)


def find_tables(folder: Path, names: list[str], splits: tuple[str, ...]) -> dict[str, Path]:
    """{split: table} of the task with one of these names below `folder`, one file each, for the splits that exist.

    A task is a folder with a table for each split, whose name begins with the split's; or, with one split, a table.
    """
    for name in names:
        alone = [p for p in sorted(folder.glob(f"{name}.*")) if ending(p) in (*TEXT_TABLES, *PARQUET)]
        if len(splits) == 1 and alone:
            return {splits[0]: alone[0]}
        if is_directory(folder / name):
            found = {split: _split_of(folder / name, split) for split in splits}
            for split, files in found.items():
                if files and len(files) > 1:
                    raise UserError(
                        f"{folder / name}: {len(files)} files hold the split {split!r}; join them into one table"
                    )
            return {split: files[0] for split, files in found.items() if files and is_file(files[0])}
    return {}


def _split_of(folder: Path, split: str) -> list[Path] | None:
    """The files of a split: one table or FASTA, several parquet files, or a folder of classes."""
    known = [*TEXT_TABLES, *PARQUET, *FASTA]
    files = sorted(p for p in folder.iterdir() if is_file(p) and ending(p) in known)
    named = [p for p in files if p.name.split(".")[0] == split or re.match(rf"{split}-\d+-of-\d+\.", p.name)]
    if named:
        return named
    return [folder / split] if is_directory(folder / split) else None


def _as_table(files: list[Path], target: Path, genome: Path | None, notes: list[str]) -> Path:
    """A table of sequence and label: the file itself where it is one, otherwise a converted one."""
    if len(files) == 1 and is_file(files[0]) and ending(files[0]) not in FASTA:
        return files[0]
    if is_directory(files[0]):
        rows = list(_of_classes(files[0], genome, notes))
    elif ending(files[0]) in FASTA:
        rows = [row for file in files for row in rows_of_fasta(file)]
    else:
        rows = [row for file in files for row in _of_columns(file)]
    return _write(target, rows)


def _write(target: Path, rows: list[tuple[str, str]]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_columns(target, {"sequence": [sequence for sequence, _ in rows], "label": [label for _, label in rows]})
    return target


def _of_columns(path: Path) -> Iterator[tuple[str, str]]:
    columns = read_columns(path)
    names = columns.find("sequence", what="the sequences"), columns.find("label", what="the labels")
    yield from zip(*(map(str, columns.values[name]) for name in names), strict=True)


def _of_joint_table(folder: Path, words: tuple[str, ...], names: list[str], target: Path) -> Path | None:
    """Write the rows of one task from a parquet of all tasks, which has a column `task`."""
    for path in sorted(p for word in words for p in folder.glob(f"{word}*.parquet")):
        parquet = package("pyarrow.parquet")
        if "task" in parquet.read_schema(path).names:
            table = parquet.read_table(path, filters=[("task", "in", names)]).to_pydict()
            if table["task"]:
                return _write(target, list(zip(table["sequence"], map(str, table["label"]), strict=True)))
    return None


def rows_of_fasta(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the records of a FASTA whose headers end in `|LABEL`."""
    label, bases = None, []
    for number, line in read_lines(path):
        if line.startswith(">"):
            if label is not None:
                yield "".join(bases), label
            if "|" not in line:
                refuse_line(path, number, f"the header has no label after a |: {line[:60]!r}")
            label, bases = line.rpartition("|")[2].strip(), []
        else:
            bases.append(line.strip())
    if label is not None:
        yield "".join(bases), label


def _of_classes(folder: Path, genome: Path | None, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the rows of Genomic Benchmarks: a table of places, or a folder of text files, for each class."""
    tables = sorted(path for path in folder.iterdir() if ending(path) == ".csv")
    for path in sorted(path for path in folder.iterdir() if is_directory(path)):
        for file in sorted(path.glob("*.txt")):
            yield file.read_text().strip(), path.name
    if not tables:
        return
    if genome is None:
        raise UserError(f"{folder}: holds places of a genome; give its file with --genome")
    windows, missing, total = Windows(genome), 0, 0
    for path in tables:
        columns = read_columns(path)
        region, strand = (columns.values[columns.find(name, what="places")] for name in ("region", "strand"))
        starts, ends = (whole_numbers(columns, (name,), "places, from 0") for name in ("start", "end"))
        total += len(columns)
        for row, place in enumerate(columns.places):
            contig, start, end = windows.find(region[row]), starts[row], ends[row]
            if start >= end:
                raise UserError(f"{place}: end should be after start, got {start} and {end}")
            if contig is None:
                missing += 1
                continue
            if end > windows.contigs[contig]:
                raise UserError(
                    f"{place}: ends beyond {contig} with {windows.contigs[contig]:,} bases; it may be for another "
                    "assembly"
                )
            bases = windows.read(contig, start, end)
            bases = reverse_complement(bases) if strand[row] == "-" else bases
            yield bases.tobytes().decode(), path.name.split(".")[0]
    if total and missing == total:
        known = ", ".join(list(windows.contigs)[:5])
        raise UserError(
            f"{folder}: its places lie on contigs such as {region[0]!r}, but {genome} has {known}; it may be another "
            "genome, or one with other names of contigs"
        )
    if missing:
        notes.append(
            f"{folder}: {missing:,} of {total:,} places lie on contigs that the genome lacks, and are left out"
        )
