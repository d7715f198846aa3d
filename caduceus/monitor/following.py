"""Follow a run's metrics.jsonl from outside the process that writes it."""

import json
import os
from pathlib import Path
from typing import Any


class Follower:
    """Reads the rows that are added to a file of JSON lines, also when the file is replaced by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._offset = 0
        self.restarted = False
        """Whether the last poll began at the file's start: all rows come again."""

    def poll(self) -> list[dict[str, Any]]:
        """The rows since the last poll. A last line that is not whole yet waits for its end."""
        self.restarted = False
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset, self.restarted = status.st_ino, 0, True
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return []
        whole, newline, _ = content.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [row for row in map(_parsed, whole.split(b"\n")) if row is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
