"""RUN/wandb/sent.jsonl: a short row for each step that W&B's client was given, to recognise steps that are
made again.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from caduceus.files import append_json_line
from caduceus.monitor.wandb.history import essence, is_same_step, wandb_row
from caduceus.monitor.wandb.identity import directory
from caduceus.run.directory import RunDirectory
from caduceus.run.rows import Line, cut_after, lines_from_end

_SURE = 100
"""After so many consecutive steps that equal the sent ones bit for bit, no earlier step was made again."""
_HELD = 20_000
"""Largest number of steps in memory; others are read from the file when needed."""


def sent_path(run: Path) -> Path:
    return directory(run) / "sent.jsonl"


def never_sent(run: Path) -> bool:
    """Whether nothing of a run directory was ever given to W&B's client."""
    return next(lines_from_end(sent_path(run)), None) is None


class StaleError(Exception):
    """W&B holds a step that was undone and then made with other numbers; the argument is the newest step to keep."""


class Journal:
    """The steps that W&B has, each with its samples and losses. `last`: the newest step that W&B has."""

    def __init__(self, path: Path, last: int) -> None:
        """Open the journal; W&B has its steps up to `last`, as W&B itself says."""
        self._path = path
        self._read_anew()
        self.last = last
        newest = next(lines_from_end(path), None)
        if newest is not None and newest.row["step"] > last:
            self.drop_after(last)

    def sent(self, step: int) -> dict[str, Any] | None:
        """The row that was sent for a step; None where W&B lacks the step, or the journal lacks the row."""
        while self._oldest > step and (line := next(self._older, None)) is not None:
            self._oldest = line.row["step"]
            self._steps[self._oldest] = line.row
        return self._steps.get(step)

    def add(self, row: dict[str, Any]) -> None:
        append_json_line(self._path, row)
        self._steps[row["step"]] = row
        self.last = row["step"]
        if len(self._steps) > _HELD:
            self._read_anew()

    def drop_after(self, step: int) -> None:
        """Forget later steps: W&B does not have them."""
        cut_after(self._path, step)
        self._read_anew()
        self.last = min(self.last, step)

    def first_unsent(self, metrics: Path) -> int:
        """The byte of metrics.jsonl from which rows may have to be sent, or may have been made again since.

        It is searched from the end, so that a start reads only what is new.
        """
        if next(lines_from_end(self._path), None) is None:
            return 0
        same = 0
        for step, begin, row in _steps_from_end(metrics):
            sent = self.sent(step)
            if sent is None:  # not sent yet, or left out by `wandb.log_every`
                continue
            same = same + 1 if sent == essence(row) else 0
            if same == _SURE:
                return begin
        return 0

    def _read_anew(self) -> None:
        self._steps: dict[int, dict[str, Any]] = {}
        self._older: Iterator[Line] = lines_from_end(self._path)
        self._oldest = math.inf


def _steps_from_end(metrics: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (step, byte where its first row begins, its merged rows) for each step, newest first."""
    rows: list[Line] = []
    for line in lines_from_end(metrics):
        if rows and line.row["step"] != rows[-1].row["step"]:
            yield _together(rows)
            rows = []
        rows.append(line)
    if rows:
        yield _together(rows)


def _together(rows: list[Line]) -> tuple[int, int, dict[str, Any]]:
    whole: dict[str, Any] = {}
    for line in reversed(rows):
        whole |= line.row
    return whole["step"], rows[-1].begin, whole


def send(begun: Any, journal: Journal, row: dict[str, Any], markers: Callable[[int], dict[str, Any]]) -> None:
    """Give a whole step to the client, once, with the `markers` of the step.

    Raises `StaleError` where W&B has the step with other numbers.
    """
    step = row["step"]
    if step > journal.last:
        begun.log({**wandb_row(row), **markers(step)}, step)
        journal.add(essence(row))
    elif (sent := journal.sent(step)) is not None and not is_same_step(sent, row):
        raise StaleError(step - 1)


def newest_step(run: RunDirectory) -> int:
    newest = run.newest_metrics("step")
    return newest[-1]["step"] if newest else 0


def is_whole(run: RunDirectory, step: int, end: dict[str, Any], steps: int) -> bool:
    """Whether the newest step has all its rows: a trainer may have been killed in the middle of its validation."""
    if end.get("exit") == 0 or step >= steps:
        return True
    return any(checkpoint.step >= step for checkpoint in run.checkpoints())
