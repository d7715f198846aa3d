"""Files of JSON lines that grow for millions of rows, read from their end, so that a start costs what is new.

A row tells its `step`, and no row stands before one of an earlier step: what is made again is cut off first.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from caduceus.files import is_file, patient, patiently

_BLOCK = 1 << 16
REACH = 64 << 20
"""How far back from its end a file is searched for rows of a kind, in bytes."""


@dataclass(frozen=True)
class Line:
    """A row, and where its line begins and ends in the file, in bytes."""

    begin: int
    end: int
    row: dict[str, Any]


def lines_from_end(
    path: Path, key: str | None = None, end: int | None = None, reach: int | None = None
) -> Iterator[Line]:
    """The rows of a file of JSON lines, the newest first; none where it is absent.

    Only those with `key`, where one is given; only lines that end at byte `end` or before; none that begins more than
    `reach` bytes before that. What is no row, such as a line that a kill cut short, is left out.
    """
    mark = None if key is None else f'"{key}":'.encode()
    try:
        file = patiently(lambda: path.open("rb"))
    except FileNotFoundError:
        return
    with file:
        place = os.fstat(file.fileno()).st_size if end is None else end
        least = 0 if reach is None else max(0, place - reach)
        rest = b""  # from `place` up to the end of the newest line not told yet
        while place > 0:
            begin = max(0, place - _BLOCK)
            rest, at = _read(file, begin, place) + rest, begin
            newline = rest.find(b"\n")  # up to it, a line that begins further back
            first = 0 if begin == 0 else newline + 1 if newline >= 0 else len(rest)
            whole, place = rest[first:], begin
            rest = rest[:first]
            if mark is None or mark in whole:
                yield from _newest_first(whole, at + first, mark, least)
            if begin <= least:
                return


@patient
def _read(file: IO[bytes], begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def _newest_first(text: bytes, offset: int, mark: bytes | None, least: int) -> Iterator[Line]:
    """The rows in whole lines that stand at `offset` of their file, the newest first."""
    end = text.rfind(b"\n") + 1
    while end > 0:
        begin = text.rfind(b"\n", 0, end - 1) + 1
        line = text[begin:end]
        if (mark is None or mark in line) and offset + begin >= least and (row := _parsed(line)) is not None:
            yield Line(offset + begin, offset + end, row)
        end = begin


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def newest_rows(path: Path, key: str, count: int, end: int | None = None) -> list[dict[str, Any]]:
    """The newest `count` rows that have `key`, oldest first, of those in the file's last `REACH` bytes."""
    found = islice(lines_from_end(path, key, end, REACH), count)
    return [line.row for line in found][::-1]


def cut_after(path: Path, step: int) -> None:
    """Drop the rows after `step`, in place: what stays is not written again."""
    if not is_file(path):
        return
    keep = next((line.end for line in lines_from_end(path) if line.row["step"] <= step), 0)
    with path.open("rb+") as file:
        if os.fstat(file.fileno()).st_size > keep:
            file.truncate(keep)
            os.fsync(file.fileno())
