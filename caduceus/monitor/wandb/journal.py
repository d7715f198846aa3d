"""What was given to W&B's client: RUN/wandb/sent.jsonl, a short row per step, by which a step made again is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from caduceus.files import append_json_line, read_json_lines, write_atomically
from caduceus.monitor.wandb.history import essence, is_same_step, wandb_row
from caduceus.run.directory import RunDirectory


class StaleError(Exception):
    """W&B holds a step that was undone and made again in another way; the argument is the newest step to keep."""


class Journal:
    """Steps that W&B has, by what tells two makings of a step apart. `last` is the newest step that W&B has."""

    def __init__(self, path: Path, last: int) -> None:
        """What of the journal W&B has: its steps up to `last`, as W&B itself tells."""
        self._path = path
        self.steps: dict[int, dict[str, Any]] = {row["step"]: row for row in read_json_lines(path)}
        self.last = last
        if any(step > last for step in self.steps):
            self.drop_after(last)

    def add(self, row: dict[str, Any]) -> None:
        self.steps[row["step"]] = row
        self.last = row["step"]
        append_json_line(self._path, row)

    def drop_after(self, step: int) -> None:
        """Forget later steps: W&B does not have them."""
        self.steps = {number: row for number, row in self.steps.items() if number <= step}
        self.last = min(self.last, step)
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in self.steps.values()).encode())


def send(begun: Any, journal: Journal, row: dict[str, Any], markers: Callable[[int], dict[str, Any]]) -> None:
    """Give a whole step to the client, once, with the `markers` of the step.

    Raises `StaleError` where W&B has the step with other numbers.
    """
    step = row["step"]
    if step > journal.last:
        begun.log({**wandb_row(row), **markers(step)}, step)
        journal.add(essence(row))
    elif (sent := journal.steps.get(step)) is not None and not is_same_step(sent, row):
        raise StaleError(step - 1)


def newest_step(run: RunDirectory) -> int:
    rows = run.metrics()
    return rows[-1]["step"] if rows else 0


def is_whole(run: RunDirectory, step: int, end: dict[str, Any], steps: int) -> bool:
    """Whether the newest step has all its rows: a killed trainer may have been in the midst of its validation."""
    if end.get("exit") == 0 or step >= steps:
        return True
    return any(checkpoint.step >= step for checkpoint in run.checkpoints())
