"""BED files: contig, start, end, 0-based half-open, and a fourth column that may name the split."""

from dataclasses import dataclass
from pathlib import Path

from caduceus.tables import is_missing, read_lines, refuse_line, split_fields, whole_number

_COMMENTS = {"track", "browser"}
_CONTIG_HEADINGS = {"chrom", "chr", "chromosome", "contig", "seqname", "seqnames", "seqid", "sequence", "name", "ref"}


@dataclass(frozen=True)
class BedRow:
    """One row and the line it stands on; `name` is the fourth column."""

    line: int
    contig: str
    start: int
    end: int
    name: str | None


@dataclass(frozen=True)
class Bed:
    """The rows that hold a base, and the lines of the rows of zero length, which hold none."""

    path: Path
    rows: list[BedRow]
    empty_rows: list[int]


def read_bed(path: Path) -> Bed:
    """Read a BED file, plain or gzip: comments, `track` and `browser` lines and lines of headings are passed over.

    Raises `UserError`, which names the line, for a line that is none of these.
    """
    rows, empty_rows = [], []
    for number, line in read_lines(path):
        if line.lstrip().startswith("#") or line.split(maxsplit=1)[0] in _COMMENTS:
            continue
        fields = split_fields(line, tight=3)
        if len(fields) < 3:
            refuse_line(path, number, f"not a BED line: {line[:60]!r}; write contig, start and end, separated by tabs")
        if _is_heading(fields):
            continue
        start, end = (whole_number(fields[column], path, number, name) for column, name in ((1, "start"), (2, "end")))
        if start > end:
            refuse_line(path, number, f"start {start} is beyond end {end}; starts count from 0, ends are not included")
        if start == end:
            empty_rows.append(number)
        else:
            name = fields[3] if len(fields) > 3 and not is_missing(fields[3]) else None
            rows.append(BedRow(number, fields[0], start, end, name))
    return Bed(path, rows, empty_rows)


def _is_heading(fields: list[str]) -> bool:
    contig, start, end = (field.lower() for field in fields[:3])
    return contig in _CONTIG_HEADINGS and ("start" in start or "begin" in start) and ("end" in end or "stop" in end)
