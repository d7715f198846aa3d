"""Caches rows of the table of runs in `~/.cache/caduceus`, for runs that are over, so that thousands of runs are listed
quickly.

A row is valid as long as the run's files have the same times and sizes. Without the cache the table only takes longer.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import caduceus
from caduceus.files import fingerprint, write_atomically
from caduceus.run.directory import RunDirectory

_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "attempts.jsonl",
    "provenance.json",
    "submissions.json",
    "checkpoints",
    "logs/ends",
    "STOP",
    ".lock",
)
"""The files that tell the state of a run; for a directory, its list of names does."""
_SETTLED_SECONDS = 5.0
"""Seconds. A file that changed so recently may change again without getting a later time."""
Seen = list[list[int] | None]


@dataclass(frozen=True)
class Remembered:
    """A row, the SLURM jobs of its run, and the result of `look` from before the run was read."""

    seen: Seen
    row: list[str]
    jobs: list[str]


class Rows:
    """The cached rows of the runs below a directory."""

    def __init__(self, directory: Path) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = (
            cache / "caduceus" / "runs" / f"{fingerprint([caduceus.__version__, str(directory.resolve())])}.json"
        )
        self._found: dict[str, list] = {}
        with contextlib.suppress(OSError, ValueError):
            self._found = json.loads(self._path.read_text())
        self._kept: dict[str, list] = {}

    def get(self, run: RunDirectory) -> Remembered | None:
        """The row of a run that has not changed since it was cached; None otherwise."""
        entry = self._found.get(str(run.path))
        if entry is None or entry[0] != look(run):
            return None
        self._kept[str(run.path)] = entry
        return Remembered(*entry)

    def keep(self, run: RunDirectory, remembered: Remembered) -> None:
        """Cache a row, unless the run's files changed a moment ago."""
        newest = max((facts[0] for facts in remembered.seen if facts is not None), default=0)
        if newest < (time.time() - _SETTLED_SECONDS) * 1e9:
            self._kept[str(run.path)] = [remembered.seen, remembered.row, remembered.jobs]

    def save(self) -> None:
        """Save the rows for the next table. Where the home cannot be written to, nothing is saved."""
        if self._kept == self._found:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(self._kept).encode())


def look(run: RunDirectory) -> Seen:
    """(time of the last change in ns, size) of each file that tells the state of a run."""
    return [_facts(f"{run.path}/{name}") for name in _FILES]


def _facts(path: str) -> list[int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path for each of so many takes longer than the rest)
    except OSError:
        return None
    return [status.st_mtime_ns, status.st_size]
