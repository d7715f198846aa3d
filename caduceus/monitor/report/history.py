"""The rows of a run for a report: read in one pass, each step once, and reduced to bins on the way."""

import json
import math
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from caduceus.monitor.report.bins import Bins, Jumps
from caduceus.run.machine import OF_GPUS, OF_NODES

_BLOCK = 1 << 22
"""Bytes per read."""
_TAIL = 50
_EVALUATED, _SPACE = "evaluated", "eval/"
_MACHINES = frozenset({*OF_NODES, *OF_GPUS})


class _Row(msgspec.Struct, gc=False):
    """The parts of a training row that the report shows."""

    step: int
    loss: float | None
    tokens: float | None = None
    samples: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    peak_memory_bytes: float | None = None


_COLUMNS = _Row.__struct_fields__
_SECONDS = _COLUMNS.index("seconds")
_decode, _astuple = msgspec.json.Decoder(_Row).decode, msgspec.structs.astuple
_pack = struct.Struct(f"{len(_COLUMNS)}d").pack


@dataclass(frozen=True)
class Table:
    """Rows that only some steps have. steps: (rows,); columns: {name: (rows,)}, NaN where a row lacks the value."""

    steps: np.ndarray
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class History:
    """The rows of a metrics.jsonl. A value that a row lacks, or that was not finite, is NaN.

    train, least, most: means, minima and maxima of each column of the training rows, in bins of `stride` steps, each
    (bins,); the column `hours` is the time in training steps up to the end of each step, without validations,
    checkpoints and starts. first, last: (step, value) of the first and last row with a column; tail: its last 50
    values. end: the last row's values. valid: the validations' values, which begin with `valid_`; vitals: numbers about
    kinds of parameters and layers, such as `grad_norm/KIND`; machines: of nodes and GPUs; evaluations: `NAME/NUMBER`.
    jumps: (step, samples) of each rewind. unreadable: the number of complete lines that are not rows.
    """

    train: dict[str, np.ndarray]
    least: dict[str, np.ndarray]
    most: dict[str, np.ndarray]
    stride: int
    rows: int
    first: dict[str, tuple[int, float]]
    last: dict[str, tuple[int, float]]
    tail: dict[str, np.ndarray]
    end: dict[str, float]
    valid: Table
    vitals: Table
    machines: Table
    evaluations: Table
    jumps: list[tuple[int, int]]
    unreadable: int

    @property
    def steps(self) -> int:
        """The newest step."""
        return int(self.end["step"])

    def at(self, steps: np.ndarray, axis: str) -> np.ndarray:
        """The positions of steps on an axis: `step`, `tokens` or `hours`."""
        if axis == "step":
            return np.asarray(steps, float)
        known = np.r_[0, self.train["step"], self.end["step"]]
        return np.interp(steps, known, np.r_[0, self.train[axis], self.end[axis]])


class _MadeAgainError(Exception):
    """A step follows one that is not earlier."""


def read_history(path: Path) -> History:
    """Read a metrics.jsonl.

    Where a step was made again, only its last row counts, and rows between the two do not count. A last line without
    its end is still being written, and is left out.
    """
    try:
        return _Reader(path).read()
    except _MadeAgainError:  # in files of earlier versions; now rows that are made again are cut off first
        return _Reader(path, _that_count(path)).read()


def _that_count(path: Path) -> np.ndarray:
    """Whether each row counts: no later row of training has the same or an earlier step."""
    steps, training = array("d"), array("d")
    for row in _rows(path):
        if row is not None:
            step, is_training = (row.step, True) if isinstance(row, _Row) else (row["step"], "loss" in row)
            steps.append(step)
            training.append(step if is_training else math.inf)
    least = np.minimum.accumulate(np.array(training)[::-1])[::-1]
    return np.array(steps) < np.r_[least[1:], math.inf]


class _Reader:
    """Reads the rows of a file; `count`: whether each row counts, None where all do."""

    def __init__(self, path: Path, count: np.ndarray | None = None) -> None:
        self._path, self._count = path, count
        self._unreadable = 0
        self._valid, self._vitals = _Growing(), _Growing()
        self._machines, self._evaluations = _Growing(), _Growing()
        self._bins, self._jumps = Bins(len(_COLUMNS) + 1), Jumps()
        self._hours, self._step = 0.0, -math.inf
        self._tail = np.empty((0, len(_COLUMNS) + 1))
        self._first: dict[str, tuple[int, float]] = {}
        self._last: dict[str, tuple[int, float]] = {}

    def read(self) -> History:
        """The history. Raises `_MadeAgainError` where it needs `count`."""
        block, place = bytearray(), -1
        for row in _rows(self._path):
            if row is None:
                self._unreadable += 1
                continue
            place += 1
            if self._count is not None and not self._count[place]:
                continue
            if not isinstance(row, _Row):
                row = self._take(row)
            if row is not None:
                block += _packed(row)
                if len(block) >= _BLOCK:
                    self._add(block)
                    block = bytearray()
        if block:
            self._add(block)
        return self._history()

    def _take(self, row: dict[str, Any]) -> _Row | None:
        """Store the further numbers of a row, and return the step's own numbers."""
        step, names = row["step"], [name for name in row if "/" in name]
        if "valid_loss" in row:
            self._valid.add(step, {name: value for name, value in row.items() if name.startswith("valid_")})
        if "loss" in row and (told := [name for name in names if not name.startswith("loss/")]):
            self._vitals.add(step, {name: row[name] for name in told})
        if _EVALUATED in row:
            told = [name for name in names if name.startswith(_SPACE) and not name.endswith("/seconds")]
            self._evaluations.add(step, {name.removeprefix(_SPACE): row[name] for name in told})
        if told := [name for name in names if name.partition("/")[0] in _MACHINES]:
            self._machines.add(step, {name: row[name] for name in told})
        if "loss" not in row:
            return None
        return _Row(**{name: _number(row.get(name)) for name in _COLUMNS} | {"step": step})

    def _add(self, packed: bytearray) -> None:
        block = np.frombuffer(packed).reshape(-1, len(_COLUMNS)).copy()
        block[~np.isfinite(block)] = np.nan
        steps = block[:, 0]
        if self._count is None and (steps[0] <= self._step or (np.diff(steps) <= 0).any()):
            raise _MadeAgainError
        hours = self._hours + np.nancumsum(block[:, _SECONDS]) / 3600
        self._hours, self._step = hours[-1], steps[-1]
        block = np.column_stack([block, hours])
        self._bins.add(block)
        self._jumps.add(steps, block[:, _COLUMNS.index("samples")])
        self._tail = np.concatenate([self._tail, block])[-_TAIL:]
        for name, values in zip(_COLUMNS, block.T, strict=False):
            known = np.flatnonzero(~np.isnan(values))
            if len(known):
                self._first.setdefault(name, (int(steps[known[0]]), values[known[0]]))
                self._last[name] = int(steps[known[-1]]), values[known[-1]]

    def _history(self) -> History:
        names = (*_COLUMNS, "hours")
        mean, least, most = (dict(zip(names, table.T, strict=True)) for table in self._bins.table())
        tail = dict(zip(names, self._tail.T, strict=True))
        return History(
            train=mean,
            least=least,
            most=most,
            stride=self._bins.stride,
            rows=self._bins.rows,
            first=self._first,
            last=self._last,
            tail=tail,
            end={name: values[-1] for name, values in tail.items() if len(values)},
            valid=self._valid.table(),
            vitals=self._vitals.table(),
            machines=self._machines.table(),
            evaluations=self._evaluations.table(),
            jumps=self._jumps.end(),
            unreadable=self._unreadable,
        )


class _Growing:
    """Columns that grow by rows, each of which may have other names."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._columns: dict[str, array] = {}

    def add(self, step: int, values: dict[str, Any]) -> None:
        for name in [name for name in values if name not in self._columns]:
            self._columns[name] = array("d", [math.nan]) * len(self._steps)
        if self._steps and self._steps[-1] == step:
            for name, value in values.items():
                self._columns[name][-1] = _number(value)
            return
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(_number(values.get(name)))

    def table(self) -> Table:
        """The rows by their steps; where a step has several, the last."""
        steps = np.array(self._steps, np.int64)
        order = np.argsort(steps, kind="stable")
        order = order[np.r_[np.diff(steps[order]) > 0, True]] if len(order) else order
        return Table(steps[order], {name: np.array(column)[order] for name, column in self._columns.items()})


def _rows(path: Path) -> Iterator["_Row | dict[str, Any] | None"]:
    """Yield the content of each complete line: a `_Row` if it has nothing else, a dict of other rows, None for a line
    that is not a row.
    """
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            lines = (block + file.readline()).split(b"\n")
            lines.pop()  # empty, or without its end
            for line in lines:
                if b"/" not in line or line.count(b"/") == line.count(b'"loss/'):
                    try:
                        yield _decode(line)
                        continue
                    except msgspec.MsgspecError:
                        pass
                if not line or line.isspace():
                    continue
                yield _parsed(line)


def _packed(row: _Row) -> bytes:
    try:
        return _pack(*_astuple(row))
    except struct.error:  # null for a value that was not finite, or absent
        return _pack(*map(_number, _astuple(row)))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = msgspec.json.decode(line)
    except msgspec.MsgspecError:
        try:
            row = json.loads(line)  # this parser accepts NaN, which earlier versions wrote
        except ValueError:
            return None
    is_row = isinstance(row, dict) and type(row.get("step")) is int
    known = ("loss", "valid_loss", _EVALUATED)
    if is_row and (any(name in row for name in known) or any(name.partition("/")[0] in _MACHINES for name in row)):
        return row
    return None


def _number(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan
