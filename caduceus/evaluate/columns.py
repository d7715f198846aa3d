"""Reads and writes users' tables as columns: CSV, TSV and parquet. Imports no torch."""

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from caduceus.errors import UserError
from caduceus.files import replacing, write_atomically
from caduceus.tables import read_table

TEXT_TABLES = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".tab": "\t"}
"""Endings of text tables -> the separator of fields in tables that are written."""
PARQUET = (".parquet", ".pq")
_COMPRESSED = (".gz", ".bgz")


@dataclass(frozen=True)
class Columns:
    """A table by columns. `places` names each row's place in the file for error messages."""

    path: Path
    values: dict[str, list[Any]]
    places: list[str]

    def __len__(self) -> int:
        return len(self.places)

    def find(self, *names: str, what: str) -> str:
        """The first of the names that is a column, regardless of case. Raises `UserError` where none is."""
        by_lower = {name.lower(): name for name in self.values}
        for name in names:
            if name in self.values or name.lower() in by_lower:
                return name if name in self.values else by_lower[name.lower()]
        have = ", ".join(list(self.values)[:12])
        raise UserError(f"{self.path}: no column {' or '.join(map(repr, names))} for {what}; it has {have}")

    def has(self, name: str) -> bool:
        return name in self.values or name.lower() in map(str.lower, self.values)


def ending(path: str | Path) -> str:
    """The ending of a file's name in lower case, ignoring that of a compression."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def package(name: str) -> ModuleType:
    """Import a package of the extra `evaluate`. Raises `UserError`, which says how to install it, where it is
    missing.
    """
    try:
        return import_module(name)
    except ImportError:
        known = {"sklearn": "scikit-learn"}.get(name.partition(".")[0], name.partition(".")[0])
        raise UserError(f"this needs the package {known}: pip install 'caduceus[evaluate]'") from None


def read_columns(path: str | Path) -> Columns:
    """Read a CSV, TSV or parquet table. Raises `UserError` where it is not readable or has no row.

    Values of text tables are text; those of parquet have their stored types.
    """
    path = Path(path)
    if ending(path) in PARQUET:
        columns = _read_parquet(path)
    else:
        table = read_table(path)
        by_column = zip(*table.rows, strict=True) if table.rows else ([] for _ in table.headings)
        values = {name: list(column) for name, column in zip(table.headings, by_column, strict=True)}
        columns = Columns(path, values, [f"{path}:{line}" for line in table.lines])
    if len(columns) == 0:
        raise UserError(f"{path}: the table has no row")
    return columns


def _read_parquet(path: Path) -> Columns:
    parquet = package("pyarrow.parquet")
    arrow = package("pyarrow")
    try:
        table = parquet.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{path}: not readable as parquet ({' '.join(str(error).split())[:200]})") from None
    values = {name: table.column(name).to_pylist() for name in table.column_names}
    return Columns(path, values, [f"{path}: row {row + 1}" for row in range(table.num_rows)])


def check_table_name(path: str | Path, *others: str) -> None:
    """Raise `UserError` where the ending of an output's name is not that of a table."""
    known = [*TEXT_TABLES, *PARQUET, *others]
    if ending(path) not in known:
        raise UserError(f"--out: {path} should end in one of {', '.join(known)}, which says its format")


def write_columns(path: str | Path, values: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Write a table in the format of its name's ending, whole or not at all. NaN and None become empty."""
    path = Path(path)
    if ending(path) in PARQUET:
        arrow, parquet = package("pyarrow"), package("pyarrow.parquet")
        table = arrow.table({name: _arrow(column) for name, column in values.items()})
        with replacing(path) as file:
            parquet.write_table(table, file)
        return
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=TEXT_TABLES[ending(path)], lineterminator="\n")
    writer.writerow(values)
    writer.writerows(zip(*(map(as_text, column) for column in values.values()), strict=True))
    content = buffer.getvalue().encode()
    if Path(str(path).lower()).suffix in _COMPRESSED:
        content = gzip.compress(content, mtime=0)
    write_atomically(path, content)


def as_text(value: Any) -> str:
    """A value as text for tables and VCF: numbers to seven digits, empty for NaN and None."""
    if value is None or (isinstance(value, (float, np.floating)) and value != value):
        return ""
    return f"{value:.7g}" if isinstance(value, (float, np.floating)) else str(value)


def mean_and_spread(found: Mapping[str, Any], digits: int) -> str:
    """`mean` and, where there is one, `spread` as text, such as 0.913 ± 0.004; a dash where a metric is undefined."""
    shown = [f"{value:.{digits}f}" for value in (found["mean"], found.get("spread")) if value is not None]
    return " ± ".join(shown) if found["mean"] is not None else "-"


def _arrow(column: Sequence[Any] | np.ndarray) -> Any:
    arrow = package("pyarrow")
    if isinstance(column, np.ndarray) and column.ndim == 2:
        flat = arrow.array(np.ascontiguousarray(column).reshape(-1))
        return arrow.FixedSizeListArray.from_arrays(flat, column.shape[1])
    if isinstance(column, np.ndarray) and column.dtype.kind == "f":
        return arrow.array(column, from_pandas=True)
    return arrow.array(column)
