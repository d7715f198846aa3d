"""Text tables as common tools write them (BED, contig names, sizes, VCF, CSV), read in one way.

It accepts gzip and bgzip, a byte order mark, UTF-16 with one, any line ends, blanks at the ends of lines and fields,
and blank lines. Anything else raises a `UserError` whose one line names the file and the number of the line. Imports no
torch.
"""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from caduceus.errors import UserError
from caduceus.gunzip import GZIP_MAGIC, Gunzip

_LINE_END = re.compile(r"\r\n|\n|\r")  # not `splitlines`, which also splits at some characters within fields
_UTF_16 = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
"""Encodings by the byte order mark of a file."""
_BGZIP_FIELD, _BGZIP_END = b"BC\x02\x00", bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""In the header of a bgzip file, and its last block, which is empty: without it a file may have been cut off."""
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
}
_MISSING = {"", ".", "-", "na", "n/a", "nan", "null", "none"}


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank: (number of the line, counted from 1; text without the line end)."""
    lines = [line.lstrip("\ufeff") for line in _LINE_END.split(_read_text(Path(path)))]  # joined files have one each
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def split_fields(line: str, tight: int | None = None) -> list[str]:
    """The fields of a line, without blanks around them.

    Tabs separate them where there are any, blanks otherwise. The first `tight` fields (None: all) can hold no blank: a
    line where one of them does, or that has fewer fields, mixes tabs and blanks, and is split at both.
    """
    fields = [field.strip() for field in line.rstrip().split("\t")]
    whole = fields if tight is None else fields[:tight]
    if len(whole) < (2 if tight is None else tight) or any(len(field.split()) > 1 for field in whole):
        return line.split()
    return fields


@dataclass(frozen=True)
class TextTable:
    """A table with headings: `rows`, each of as many fields, and the line number of each row."""

    headings: list[str]
    rows: list[list[str]]
    lines: list[int]


def read_table(path: str | Path) -> TextTable:
    """Read a table whose first line holds the headings.

    The separator of that line (tab, comma, semicolon or blank) is that of the table. Fields may be quoted as in CSV.
    Lines that begin with `##` are comments; the headings may follow a `#`.
    """
    lines = [(number, line) for number, line in read_lines(path) if not line.startswith("##")]
    if not lines:
        raise UserError(f"{path}: holds no line; give a table whose first line names its columns")
    headings = lines[0][1].strip()
    delimiter = next((mark for mark in "\t,;" if mark in headings), None)
    rows = [_fields(line.rstrip("\r\n"), delimiter) for _, line in lines]
    rows[0][0] = rows[0][0].lstrip("# ")
    twice = next((name for place, name in enumerate(rows[0]) if name in rows[0][:place]), None)
    if twice is not None:
        refuse_line(path, lines[0][0], f"two columns are named {twice!r}; give each column its own name")
    for (number, line), row in zip(lines, rows, strict=True):
        if len(row) != len(rows[0]):
            mark = {"\t": "tabs", ",": "commas", ";": "semicolons", None: "blanks"}[delimiter]
            refuse_line(
                path,
                number,
                f"has {len(row)} fields separated by {mark}, but the table has {len(rows[0])} headings: {line[:60]!r}",
            )
    return TextTable(rows[0], rows[1:], [number for number, _ in lines[1:]])


def _fields(line: str, delimiter: str | None) -> list[str]:
    if delimiter is None:
        return line.split()
    return [field.strip() for field in next(csv.reader([line], delimiter=delimiter))]


def whole_number(text: str, path: str | Path, line: int, name: str) -> int:
    """A whole number of at least 0 in plain digits. Raises `UserError` for anything else."""
    if not re.fullmatch(r"[0-9]+", text):
        refuse_line(path, line, f"{name} must be a whole number in plain digits, got {text[:40]!r}")
    return int(text)


def is_missing(text: str) -> bool:
    """Whether a field says that a value is missing: empty, na, NaN, a dot, a dash and the like."""
    return text.strip().lower() in _MISSING


def refuse_line(path: str | Path, line: int, message: str) -> NoReturn:
    """Raise a `UserError` about one line of a file."""
    raise UserError(f"{path}:{line}: {message}")


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if content.startswith(GZIP_MAGIC):
        if content[12:16] == _BGZIP_FIELD:
            end = content.rfind(_BGZIP_END)
            if end < 0 or content.startswith(GZIP_MAGIC, end + len(_BGZIP_END)):
                raise UserError(f"{path}: truncated (the end marker of bgzip is missing); download it again")
        content = b"".join(Gunzip(path, io.BytesIO(content).read, is_text=True))
    for beginning, kind in _OTHER_FORMATS.items():
        if content.startswith(beginning):
            raise UserError(f"{path}: is {kind}, not a text table; save it as text, plain or gzip")
    encoding = next((name for mark, name in _UTF_16.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        refuse_line(path, line, f"is not {encoding.upper()} text ({error.reason}); save the file as UTF-8")
    if "\0" in text:
        refuse_line(path, 1 + text.count("\n", 0, text.index("\0")), "holds binary data; give a text table")
    return text
