"""The rows of a run as columns: read line by line, each step once, small enough for runs of millions of steps."""

import json
import math
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_EVALUATED, _SPACE = "evaluated", "eval/"
_COLUMNS = ("step", "tokens", "samples", "loss", "lr", "grad_norm", "tokens_per_second", "seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class History:
    """The rows of a metrics.jsonl. A value that a row lacks, or that was not finite, is NaN.

    train: columns of the training rows, each (steps,). valid_steps, valid: steps of the validations and their values
    by name, which begin with `valid_`. vital_steps, vitals: the same of the steps that tell of kinds of parameters and
    of layers, `grad_norm/KIND` and so on. evaluation_steps, evaluations: the same of evaluations, `NAME/NUMBER`.
    unreadable: whole lines that are no rows.
    """

    train: dict[str, np.ndarray]
    valid_steps: np.ndarray
    valid: dict[str, np.ndarray]
    vital_steps: np.ndarray
    vitals: dict[str, np.ndarray]
    evaluation_steps: np.ndarray
    evaluations: dict[str, np.ndarray]
    unreadable: int

    @property
    def hours(self) -> np.ndarray:
        """Hours of training steps up to the end of each step; validations, checkpoints and starts do not count."""
        return np.nancumsum(self.train["seconds"]) / 3600

    def at(self, steps: np.ndarray, axis: str) -> np.ndarray:
        """Where steps stand on an axis: `step`, `tokens` (billions) or `hours`."""
        if axis == "step":
            return np.asarray(steps, float)
        values = self.hours if axis == "hours" else self.train["tokens"] / 1e9
        return np.interp(steps, np.r_[0, self.train["step"]], np.r_[0, values])

    def jumps(self) -> list[tuple[int, int]]:
        """(step, samples) of each rewind: the step that the run went back to, and how many samples it passed over.

        A rewind goes on with the samples that follow, so that one step alone is further from the step before it.
        """
        counts = np.diff(np.r_[0, self.train["samples"]])
        if len(counts) < 2:
            return []
        before = np.r_[counts[1], counts[:-1]]
        after = np.r_[counts[1:], counts[-2]]
        consecutive = np.diff(np.r_[0, self.train["step"]]) == 1
        found = np.flatnonzero(consecutive & (counts > before) & (counts > after))
        usual = np.minimum(before, after)
        return [(int(self.train["step"][at]) - 1, int(counts[at] - usual[at])) for at in found]


def read_history(path: Path) -> History:
    """Read a metrics.jsonl. Where a step was made again, its last row counts.

    Rows that followed the earlier one no longer count. A last line without its end is still being written and is left
    out.
    """
    train = {name: array("d") for name in _COLUMNS}
    valid: dict[int, dict[str, float]] = {}
    vitals: dict[int, dict[str, float]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    unreadable = 0
    with path.open("rb") as file:
        for line in file:
            row = _parsed(line)
            if row is None:
                unreadable += line.endswith(b"\n") and not line.isspace()
                continue
            step = row["step"]
            if "loss" in row:
                if train["step"] and step <= train["step"][-1]:
                    _forget(train, (valid, vitals, evaluations), step)
                for name, column in train.items():
                    column.append(_number(row.get(name)))
                told = {name: _number(value) for name, value in row.items() if _is_vital(name)}
                vitals |= {step: told} if told else {}
            if "valid_loss" in row:
                valid[step] = {name: _number(value) for name, value in row.items() if name.startswith("valid_")}
            if _EVALUATED in row:
                told = {name: _number(value) for name, value in row.items() if name.startswith(_SPACE)}
                told = {
                    name.removeprefix(_SPACE): value for name, value in told.items() if not name.endswith("/seconds")
                }
                evaluations.setdefault(step, {}).update(told)
    arrays = {name: np.array(column) for name, column in train.items()}
    return History(arrays, *_columns(valid), *_columns(vitals), *_columns(evaluations), unreadable)


def _is_vital(name: str) -> bool:
    return "/" in name and not name.startswith("loss/")


def _columns(rows: dict[int, dict[str, float]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and a column for each name that any of them has."""
    names = dict.fromkeys(name for values in rows.values() for name in values)
    steps = sorted(rows)
    columns = {name: np.array([rows[step].get(name, math.nan) for step in steps]) for name in names}
    return np.array(steps, dtype=np.int64), columns


def _forget(train: dict[str, array], others: tuple[dict[int, Any], ...], step: int) -> None:
    """Drop what was made from `step` on before it was made again."""
    first = bisect_left(train["step"], step)
    for column in train.values():
        del column[first:]
    for rows in others:
        for made in [made for made in rows if made >= step]:
            del rows[made]


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and type(row.get("step")) is int
    return row if whole and any(name in row for name in ("loss", "valid_loss", _EVALUATED)) else None


def _number(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def binned(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean x, and mean, least and greatest y, of at most `bins` runs of neighbours; NaN where all of a bin's y are.

    x, y: (points,). With no more points than bins they come as they are.
    """
    if len(x) <= bins:
        return x, y, y, y
    starts = np.linspace(0, len(x), bins, endpoint=False).astype(np.int64)
    known = ~np.isnan(y)
    counts = np.add.reduceat(known.astype(np.int64), starts)
    sizes = np.diff(np.r_[starts, len(x)])
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(known, y, 0.0), starts) / counts
    least = np.minimum.reduceat(np.where(known, y, np.inf), starts)
    most = np.maximum.reduceat(np.where(known, y, -np.inf), starts)
    empty = counts == 0
    least[empty] = most[empty] = np.nan
    return np.add.reduceat(x, starts) / sizes, mean, least, most
