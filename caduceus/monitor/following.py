"""Follows a run's metrics.jsonl from another process than the one that writes it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_CHECKED = 256
"""Number of the last bytes read that are compared, to see whether the file was cut off and continued meanwhile."""


class Follower:
    """Reads the rows that are added to a JSON-lines file, also after it was cut off and continued, or replaced.

    begin: a function that returns the byte, at the start of a line, where reading begins. It is called when the file
    first exists, and whenever earlier rows change; by default reading begins at the start.
    """

    def __init__(self, path: Path, begin: Callable[[], int] = lambda: 0) -> None:
        self._path = path
        self._begin = begin
        self._inode: int | None = None
        self._offset = 0
        self._before = b""
        self.restarted = False
        """Whether the last poll began anew: earlier rows may have been dropped, or come again."""

    def poll(self) -> list[dict[str, Any]]:
        """The rows since the last poll. An incomplete last line is read once it is complete."""
        self.restarted = False
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_ino != self._inode or self._tail(file) != self._before:
                    self._inode, self._offset, self.restarted = os.fstat(file.fileno()).st_ino, self._begin(), True
                file.seek(self._offset)
                content = file.read()
                whole, newline, _ = content.rpartition(b"\n")
                self._offset += len(whole) + len(newline)
                self._before = self._tail(file)
        except OSError:
            return []
        return [row for row in map(_parsed, whole.split(b"\n")) if row is not None]

    def _tail(self, file: BinaryIO) -> bytes:
        """The bytes before the position up to which the file was read."""
        begin = max(0, self._offset - _CHECKED)
        file.seek(begin)
        return file.read(self._offset - begin)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
