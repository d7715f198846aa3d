"""Tables that say which names mean the same contig, and what kind of sequence it is."""

from dataclasses import dataclass, field
from pathlib import Path

from caduceus.errors import UserError

_REPORT_NAMES = ("Sequence-Name", "GenBank-Accn", "RefSeq-Accn", "UCSC-style-name")
_REPORT_KINDS = {
    "alt-scaffold": "alt",
    "fix-patch": "alt",
    "novel-patch": "alt",
    "unlocalized-scaffold": "random",
    "unplaced-scaffold": "unplaced",
}
_REPORT_LOCATIONS = {"mitochondrion": "mitochondrion", "chloroplast": "plastid", "plastid": "plastid"}


@dataclass
class AliasTable:
    """`groups`: a name -> all names of the same contig. `kinds`: a name -> why such a contig is left out by default,
    None for an assembled chromosome; names of which the table says nothing are absent."""

    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: dict[str, str | None] = field(default_factory=dict)


def read_aliases(path: Path) -> AliasTable:
    """Read an NCBI assembly report, or a tab-separated table with one contig a row and one naming scheme a column."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the alias table cannot be read ({error})") from None
    header = next((line for line in lines if line.startswith("#") and "Sequence-Name\t" in line), None)
    columns = header.lstrip("# ").split("\t") if header else None
    table = AliasTable()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        values = line.split("\t")
        if columns is None:
            names = tuple(dict.fromkeys(name for name in values if name))
        else:
            row = dict(zip(columns, values, strict=False))
            names = tuple(dict.fromkeys(row.get(key, "na") for key in _REPORT_NAMES if row.get(key, "na") != "na"))
            table.kinds |= dict.fromkeys(names, _report_kind(row))
        for name in names:
            if name in table.groups:
                raise UserError(f"{path}:{number}: '{name}' stands in two rows; each row must name another contig")
            table.groups[name] = names
    if not table.groups:
        raise UserError(f"{path}: holds no row; give a table with one contig a row, its names separated by tabs")
    return table


def _report_kind(row: dict[str, str]) -> str | None:
    location = row.get("Assigned-Molecule-Location/Type", "").lower()
    return _REPORT_LOCATIONS.get(location) or _REPORT_KINDS.get(row.get("Sequence-Role", ""))
