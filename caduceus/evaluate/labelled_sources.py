"""Labelled sequences from files other than tables: FASTA, BED with a genome and a bigWig, folders of benchmarks.

They are written as tables beside the output, OUT.data/SPLIT.parquet, from which a fine-tuning reads. Imports no torch.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.bed import BedRow, read_bed
from caduceus.errors import UserError
from caduceus.evaluate.columns import PARQUET, TEXT_TABLES, ending, package, write_columns
from caduceus.evaluate.labelled import LabelledTable
from caduceus.evaluate.sequences import BED, FASTA
from caduceus.evaluate.suite_data import find_task_data, rows_of_fasta
from caduceus.evaluate.windows import Windows
from caduceus.patience import is_directory, is_file

SIGNALS = ("mean", "max")


@dataclass(frozen=True)
class LabelledSource:
    """What files of places need: the genome, the number of bases around the middle of each row, and a bigWig of values.

    Without a bigWig the label is the fourth column. task: with per-base each base has its value. signal: otherwise the
    label is the mean or max of the row's values.
    """

    genome: str | Path | None = None
    aliases: str | Path | None = None
    window: int | None = None
    bigwig: str | Path | None = None
    signal: str = "mean"
    task: str = "auto"

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise UserError(f"--signal: choose one of {', '.join(SIGNALS)}, got {self.signal!r}")
        if self.window is not None and self.window < 1:
            raise UserError(f"--window: must be at least 1, got {self.window}")


def tables_of(
    files: dict[str, str | Path | None], source: LabelledSource, columns: Sequence[Any], out: str | Path
) -> dict[str, LabelledTable]:
    """{split: table} of the given files; `columns`: column, label and longest of a `LabelledTable`.

    A folder as train is that of a benchmark, which has its own splits.
    """
    folder = Path(f"{out}.data")
    train = Path(files["train"])
    if is_directory(train):
        genome = None if source.genome is None else Path(source.genome)
        found = find_task_data(train.parent, [train.name], folder / "table", genome)
        if found is None:
            raise UserError(f"--train: {train} holds no train split, as a table, a FASTA or a folder of classes")
        own = {split: table.path for split, table in found.tables.items()}
        files = {**own, **{split: path for split, path in files.items() if path is not None and split != "train"}}
    tables = {}
    for split, path in files.items():
        if path is not None:
            tables[split] = LabelledTable(_as_table(Path(path), source, folder / f"{split}.parquet"), *columns)
            if Path(tables[split].path).parent == folder:
                tables[split] = LabelledTable(tables[split].path, longest=columns[2])
    return tables


def _as_table(path: Path, source: LabelledSource, target: Path) -> Path:
    kind = ending(path)
    if not is_file(path):
        raise UserError(f"{path}: no such file")
    if kind in (*TEXT_TABLES, *PARQUET):
        return path
    if kind in FASTA:
        rows: list[tuple[str, Any]] = list(rows_of_fasta(path))
    elif kind in BED:
        rows = _rows_of_bed(path, source)
    else:
        known = ", ".join([*TEXT_TABLES, *PARQUET, *FASTA, *BED])
        raise UserError(f"{path}: its ending does not say what it holds; known are {known} (also with .gz)")
    if not rows:
        raise UserError(f"{path}: holds no labelled sequence")
    target.parent.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", 0)) == 0 or not is_file(target):
        write_columns(target, {"sequence": [sequence for sequence, _ in rows], "label": [label for _, label in rows]})
    return target


def _rows_of_bed(path: Path, source: LabelledSource) -> list[tuple[str, Any]]:
    """Sequence and label of each row; rows without a value in the bigWig are left out, and counted in a note."""
    if source.genome is None:
        raise UserError(f"{path}: names places of a genome; give its file with --genome")
    windows, signal = Windows(source.genome, source.aliases), None if source.bigwig is None else _Signal(source.bigwig)
    rows, empty = [], 0
    for row in read_bed(path).rows:
        place = f"{path}:{row.line}"
        contig = windows.require(row.contig, place)
        start, end = row.start, row.end
        if end > windows.contigs[contig]:
            raise UserError(
                f"{place}: ends beyond {contig} with {windows.contigs[contig]:,} bases; it may be for another assembly"
            )
        if source.window is not None:
            start = (start + end) // 2 - source.window // 2
            end = start + source.window
        label = _label(row, place, signal, start, end, source)
        if label is None:
            empty += 1
            continue
        rows.append((windows.read(contig, start, end).tobytes().decode(), label))
    if empty:
        print(f"note: {path}: {empty:,} rows have no value in {source.bigwig}, and are left out")
    return rows


def _label(row: BedRow, place: str, signal: "_Signal | None", start: int, end: int, source: LabelledSource) -> Any:
    if signal is None:
        if row.name is None:
            raise UserError(f"{place}: has no fourth column, the label; or give --bigwig")
        return row.name
    values = signal.values(row.contig, start, end, place)
    if np.isnan(values).all():
        return None
    if source.task == "per-base":
        return [None if np.isnan(value) else float(value) for value in values]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(np.nanmean(values) if source.signal == "mean" else np.nanmax(values))


class _Signal:
    """The values of a bigWig; NaN where it has none, and beyond the ends of contigs."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        if not is_file(path):
            raise UserError(f"--bigwig: {path}: no such file")
        try:
            self.file = package("pyBigWig").open(str(path))
            self.lengths: dict[str, int] = self.file.chroms() if self.file.isBigWig() else {}
        except RuntimeError:
            self.lengths = {}
        if not self.lengths:
            raise UserError(f"--bigwig: {path} is not a bigWig file")

    def values(self, contig: str, start: int, end: int, place: str) -> np.ndarray:
        """(end - start,) float64."""
        names = (contig, f"chr{contig}", contig.removeprefix("chr"))
        name = next((name for name in names if name in self.lengths), None)
        if name is None:
            known = ", ".join(list(self.lengths)[:5])
            raise UserError(f"{place}: {self.path} has no contig {contig!r}, but {known}")
        found = np.full(end - start, np.nan)
        inside = max(start, 0), min(end, self.lengths[name])
        if inside[0] < inside[1]:
            found[inside[0] - start : inside[1] - start] = self.file.values(name, *inside)
        return found
