"""Tables of the names that mean the same contig, and of its kind of sequence."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from caduceus.errors import UserError
from caduceus.tables import is_missing, read_lines, refuse_line, split_fields

# Headings of NCBI's assembly reports and its `datasets` tables, without case, blanks and dashes.
_REPORT_NAMES = {
    "sequencename",
    "genbankaccn",
    "refseqaccn",
    "ucscstylename",
    "genbankseqaccession",
    "refseqseqaccession",
}
_ROLES = {"sequencerole", "role"}
_LOCATIONS = {"assignedmoleculelocationtype", "moleculetype"}
_ROLE_KINDS = {
    "altscaffold": "alt",
    "fixpatch": "alt",
    "novelpatch": "alt",
    "unlocalizedscaffold": "random",
    "unplacedscaffold": "unplaced",
}
_LOCATION_KINDS = {
    "mitochondrion": "mitochondrion",
    "chloroplast": "plastid",
    "plastid": "plastid",
    "apicoplast": "plastid",
}
_SCHEMES = {"ucsc", "ensembl", "refseq", "genbank", "ncbi", "assembly", "insdc", "flybase", "wormbase", "tair", "sgd"}
"""Words that are headings of a column of names, or stand in the third column of UCSC's tables of alias, chrom and
source.
"""


@dataclass
class AliasTable:
    """The names of contigs, and their kinds.

    `groups`: a name -> all names of the same contig. `kinds`: a name -> why such a contig is left out by default, None
    for an assembled chromosome; a name without a kind in the table is absent. `lines`: a name -> its line in the file.
    """

    path: Path | None = None
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: dict[str, str | None] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Each contig's first line in the file, and its names."""
        for names in dict.fromkeys(self.groups.values()):
            yield min(self.lines[name] for name in names), names


def read_aliases(path: Path) -> AliasTable:
    """Read an NCBI assembly report or `datasets` table, UCSC's chromAlias in each of its forms, or any other table with
    one contig per row and one naming scheme per column, plain or gzip. Headings may follow a `#`. Raises `UserError`
    for other files.
    """
    lines = read_lines(path)
    headings, rows = _split_headings(lines)
    if headings is not None and _is_report(headings):
        table = _read_report(path, headings, rows)
    else:
        table = _read_names(path, headings, rows)
    if not table.groups:
        raise UserError(f"{path}: holds no row; give a table with one contig per row, its names separated by tabs")
    if not table.kinds and all(len(names) < 2 for names in table.groups.values()):
        refuse_line(
            path,
            min(table.lines.values()),
            f"no row of the table has two names, as {next(iter(table.groups))!r}; separate the names of a contig by "
            "tabs",
        )
    return table


def _split_headings(lines: list[tuple[int, str]]) -> tuple[list[str] | None, list[tuple[int, str]]]:
    """The columns' headings, if there are any, and the rows."""
    headings = None
    rows = []
    for number, line in lines:
        words = [_normal(word) for word in line.lstrip("# ").split("\t")]
        if line.startswith("#"):
            if len(words) > 1 and not rows and not (headings and _is_report(headings)):
                headings = words
        elif not rows and headings is None and _are_headings(words):
            headings = words
        else:
            rows.append((number, line))
    return headings, rows


def _is_report(headings: list[str]) -> bool:
    return len(_REPORT_NAMES.intersection(headings)) > 1


def _are_headings(words: list[str]) -> bool:
    return _is_report(words) or {"alias", "chrom"} <= set(words) or set(words) <= _SCHEMES


def _read_report(path: Path, headings: list[str], rows: list[tuple[int, str]]) -> AliasTable:
    table = AliasTable(path)
    for number, line in rows:
        fields = [value.strip() for value in line.rstrip().split("\t")]
        if len(fields) > len(headings) or len(fields) < 2:
            refuse_line(
                path, number, f"has {len(fields)} columns separated by tabs, but there are {len(headings)} headings"
            )
        row = dict(zip(headings, fields, strict=False))
        names = _distinct(value for key, value in row.items() if key in _REPORT_NAMES)
        table.kinds |= dict.fromkeys(names, _report_kind(row))
        _add(table, number, names)
    return table


def _read_names(path: Path, headings: list[str] | None, rows: list[tuple[int, str]]) -> AliasTable:
    table = AliasTable(path)
    fields = [(number, split_fields(line)) for number, line in rows]
    if _is_alias_chrom_source(headings, fields):
        names_of: dict[str, dict[str, int]] = {}
        for number, (alias, contig, *_) in fields:
            known = names_of.setdefault(contig, {contig: number})
            known.setdefault(alias, number)
        for known in names_of.values():
            names = _distinct(known)
            _add(table, min(known.values()), names)
        return table
    for number, values in fields:
        _add(table, number, _distinct(values))
    return table


def _is_alias_chrom_source(headings: list[str] | None, rows: list[tuple[int, list[str]]]) -> bool:
    """Whether this is UCSC's database table: alias, chrom, and the sources of the alias, separated by commas."""
    if headings is not None and headings[:2] == ["alias", "chrom"]:
        return all(len(values) >= 2 for _, values in rows)
    return bool(rows) and all(len(values) == 3 and set(values[2].lower().split(",")) <= _SCHEMES for _, values in rows)


def _add(table: AliasTable, line: int, names: tuple[str, ...]) -> None:
    for name in names:
        if name in table.groups:
            refuse_line(table.path, line, f"'{name}' occurs in two rows; each row must name another contig")
        table.groups[name] = names
        table.lines[name] = line


def _report_kind(row: Mapping[str, str]) -> str | None:
    role = next((_normal(row[key]) for key in row if key in _ROLES), "")
    location = next((_normal(row[key]) for key in row if key in _LOCATIONS), "")
    return _LOCATION_KINDS.get(location) or _ROLE_KINDS.get(role)


def _distinct(values: Iterator[str] | Mapping[str, int] | list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if not is_missing(value)))


def _normal(words: str) -> str:
    return re.sub(r"[^a-z0-9]", "", words.lower())
