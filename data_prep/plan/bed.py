"""BED files: contig, start, end, 0-based half-open, and a fourth column that may name the split."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

from caduceus.errors import UserError


@dataclass(frozen=True)
class BedRow:
    """One row and the line it stands on; `name` is the fourth column."""

    line: int
    contig: str
    start: int
    end: int
    name: str | None


def read_bed(path: Path) -> list[BedRow]:
    """All rows of a BED file, plain or gzip; a line that is not BED is a `UserError` that names it."""
    rows = []
    for number, line in enumerate(_lines(path), 1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not fields or line.startswith(("#", "track ", "track\t", "browser ")) or not line.strip():
            continue
        try:
            contig, start, end = fields[0], int(fields[1]), int(fields[2])
        except (IndexError, ValueError):
            raise UserError(
                f"{path}:{number}: not a BED line: {line[:60]!r}; write contig, start and end, separated by tabs"
            ) from None
        if not 0 <= start < end:
            raise UserError(f"{path}:{number}: start {start} and end {end} are no interval; starts count from 0")
        rows.append(BedRow(number, contig, start, end, fields[3].strip() if len(fields) > 3 else None))
    if not rows:
        raise UserError(f"{path}: holds no interval")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as BED ({error})") from None
