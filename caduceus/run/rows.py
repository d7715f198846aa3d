"""JSON-lines files that grow to millions of rows, read from their end, so that a start reads only what is new.

Every row has a `step`, and the steps never decrease: rows that are to be made again are cut off first.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from caduceus.patience import is_file, patient, patiently

_BLOCK = 1 << 16
REACH = 64 << 20
"""How far back from its end a file is searched for rows with a key, in bytes."""


@dataclass(frozen=True)
class Line:
    """A row, and the bytes of the file at which its line begins and ends."""

    begin: int
    end: int
    row: dict[str, Any]


def lines_from_end(
    path: Path, key: str | None = None, end: int | None = None, reach: int | None = None
) -> Iterator[Line]:
    """The rows of a JSON-lines file, newest first; none where the file is absent.

    key: only rows that have it. end: only lines that end at this byte or before. reach: only lines that begin at most
    so many bytes before `end`. A line that is not a row, such as one that a kill cut short, is left out.
    """
    mark = None if key is None else f'"{key}":'.encode()
    try:
        file = patiently(lambda: path.open("rb"))
    except FileNotFoundError:
        return
    with file:
        place = os.fstat(file.fileno()).st_size if end is None else end
        least = 0 if reach is None else max(0, place - reach)
        rest = b""  # the bytes from `place` to the end of the newest line that was not yielded yet
        while place > 0:
            begin = max(0, place - _BLOCK)
            rest, at = _read(file, begin, place) + rest, begin
            newline = rest.find(b"\n")  # the bytes up to it belong to a line that begins further back
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
    """The rows in `text`, which holds whole lines and begins at byte `offset` of the file, newest first."""
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
    """Drop the rows after `step` in place: the rows that stay are not written again."""
    if not is_file(path):
        return
    keep = next((line.end for line in lines_from_end(path) if line.row["step"] <= step), 0)
    with path.open("rb+") as file:
        if os.fstat(file.fileno()).st_size > keep:
            file.truncate(keep)
            os.fsync(file.fileno())
