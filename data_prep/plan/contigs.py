"""Which contigs of a genome are used, and which are left out by rule or by the user's patterns."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from caduceus.errors import UserError
from caduceus.tables import refuse_line
from data_prep.plan.aliases import AliasTable
from data_prep.plan.options import PlanOptions
from data_prep.plan.organelles import OrganelleFinder

# The first rule that matches the whole name decides. Organelles need more than the name: plan/organelles.py.
_RULES = {
    "EBV": r"(chr)?ebv|NC_007605(\.\d+)?",
    "decoy": r"hs37d5|hs38d1|.*_decoy",
    "alt": r".*_(alt|fix|novel|patch)|.*_hap\d+|HLA-.*|HSCHR.*|HG\d+.*_PATCH",
    "random": r".*_(random|unlocalized)|chr.*random",
    "unplaced": r"(chr)?un([_.-].*)?|(chr)?u(extra)?|(GL|KI|JH|GJ)\d{6}([.v]\d+)?|.*(scaffold|unplaced).*"
    r"|N[TW]_(?!03377[789]|037436)\d+(\.\d+)?",  # not the arms of D. melanogaster's chromosomes 2 and 3
}
_COMPILED = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in _RULES.items()}
BY_PATTERN = "left out by pattern"
WHY = {
    "mitochondrion": "an organelle by name or title, and by length",
    "plastid": "an organelle by name or title, and by length",
    "EBV": "a virus, by name",
    "decoy": "no part of the genome, by name",
    "alt": "other versions of bases of the chromosomes",
    "random": "not placed on their chromosome",
    "unplaced": "not placed on a chromosome",
    BY_PATTERN: "by --include or --exclude",
}
"""Why contigs of a kind are left out by default."""
SMALLEST_SHARE = 0.5
"""Share of the bases (without those excluded by the user) that `--contigs auto` must keep."""
_NAMES_SHOWN = 20


@dataclass(frozen=True)
class Selection:
    """The chosen contigs.

    `used`: those to shard, name -> length, in the file's order. `left_out`: kind -> {name: length}.
    """

    used: dict[str, int]
    left_out: dict[str, dict[str, int]]
    aliases: AliasTable

    def find(self, name: str) -> str | None:
        """The used contig that `name` means: of the same name, by the alias table, or with `chr` added or removed. None
        if none.
        """
        return self._find(name, self.used)

    def kind_of_left_out(self, name: str) -> str | None:
        """Why the contig that `name` means is left out; None where it is used or unknown."""
        return next((kind for kind, contigs in self.left_out.items() if self._find(name, contigs)), None)

    def knows(self, name: str) -> bool:
        """Whether the genome holds the contig that `name` means, used or not."""
        return self.find(name) is not None or self.kind_of_left_out(name) is not None

    def _find(self, name: str, contigs: Mapping[str, int]) -> str | None:
        forms = (form for known in names_of(name, self.aliases) for form in _forms(known))
        return next((form for form in forms if form in contigs), None)


def names_of(name: str, aliases: AliasTable) -> tuple[str, ...]:
    """All names of a contig that the table knows, itself first."""
    return tuple(dict.fromkeys((name, *aliases.groups.get(name, ()))))


def select_contigs(
    contigs: Mapping[str, int], titles: Mapping[str, str], options: PlanOptions, aliases: AliasTable
) -> Selection:
    """Apply `--include` and `--exclude`, which match whole names, and `--contigs` to the rest.

    `contigs`: name -> length. `titles`: name -> header. Where contigs that are not on a chromosome hold most of the
    bases, the assembly consists of scaffolds, and `--contigs auto` uses these too. Raises `UserError` where no contig
    is left to use.
    """
    kinds = _kinds(contigs, titles, options, aliases)
    placed, unplaced = (sum(contigs[name] for name in contigs if kinds[name] == kind) for kind in (None, "unplaced"))
    if options.contigs == "auto" and placed <= unplaced:
        kinds = {name: None if kind == "unplaced" else kind for name, kind in kinds.items()}
    used = {name: length for name, length in contigs.items() if kinds[name] is None}
    left_out: dict[str, dict[str, int]] = {}
    for name, length in contigs.items():
        kind = kinds[name]
        if kind is not None:
            left_out.setdefault(kind, {})[name] = length
    if not used:
        _print_left_out(Selection(used, left_out, aliases))
        names = ", ".join(list(contigs)[:5])
        counts = ", ".join(f"{len(group)} {kind}" for kind, group in left_out.items())
        raise UserError(
            f"none of the {len(contigs)} contigs ({names}{', …' if len(contigs) > 5 else ''}) is used: {counts}; "
            "--contigs all uses every one, --include those whose whole name matches a pattern"
        )
    return Selection(used, left_out, aliases)


def share_kept(selection: Selection) -> float:
    """The used contigs' share of the bases that the user's patterns did not leave out."""
    used = sum(selection.used.values())
    by_rule = sum(sum(contigs.values()) for kind, contigs in selection.left_out.items() if kind != BY_PATTERN)
    return used / (used + by_rule)


def describe_left_out(selection: Selection) -> dict[str, dict[str, Any]]:
    """The contigs that are left out, by kind: their number, their bases, the first names and why."""
    return {
        kind: {
            "contigs": len(contigs),
            "bases": sum(contigs.values()),
            "names": list(contigs)[:_NAMES_SHOWN],
            "why": WHY[kind],
        }
        for kind, contigs in selection.left_out.items()
    }


def alias_notes(aliases: AliasTable, selection: Selection, options: PlanOptions) -> list[str]:
    """Notes on rows of the alias table without a contig of the genome, which are counted. Raises `UserError` unless
    such rows are allowed.
    """
    unknown = [(line, names) for line, names in aliases.rows() if not any(map(selection.knows, names))]
    if not unknown:
        return []
    line, names = unknown[0]
    if not options.allow_unknown_contigs:
        refuse_line(
            aliases.path,
            line,
            f"the genome has no contig {' or '.join(names[:4])}; the table may be for another assembly; "
            "--allow-unknown-contigs passes over such rows",
        )
    return [f"--aliases: {len(unknown)} of {len(list(aliases.rows()))} rows are about contigs that the genome lacks"]


def refuse_small_share(selection: Selection, options: PlanOptions) -> None:
    """Raise `UserError` for a default choice of contigs that leaves out most of the genome, after printing what it
    leaves out.
    """
    share = share_kept(selection)
    if options.contigs != "auto" or options.include is not None or share >= SMALLEST_SHARE:
        return
    _print_left_out(selection)
    count = len(selection.used) + sum(map(len, selection.left_out.values()))
    raise UserError(
        f"only {share:.1%} of the bases would be kept ({len(selection.used)} of {count} contigs); --contigs all uses "
        "every contig, --contigs primary this choice, --include those whose whole name matches a pattern"
    )


def _print_left_out(selection: Selection) -> None:
    left_out = describe_left_out(selection)
    total = sum(selection.used.values()) + sum(group["bases"] for group in left_out.values())
    print("\n".join(left_out_table(left_out, total)), file=sys.stderr)


def left_out_table(left_out: Mapping[str, Mapping[str, Any]], total: int) -> list[str]:
    """The lines of a table of left-out contigs, by kind; `total`: bases of the genome."""
    rows = [("left out", "contigs", "bases", "share", "why", "names")]
    for kind, group in left_out.items():
        names = ", ".join(group["names"][:4]) + (", …" if group["contigs"] > 4 else "")
        share = f"{100 * group['bases'] / total:.1f} %"
        rows.append((kind, f"{group['contigs']:,}", f"{group['bases']:,}", share, group["why"], names))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 1 <= place <= 3 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _kinds(
    contigs: Mapping[str, int], titles: Mapping[str, str], options: PlanOptions, aliases: AliasTable
) -> dict[str, str | None]:
    """Why each contig is left out, by the patterns or by its kind; None where it is not."""
    organelles = OrganelleFinder(contigs)
    kinds: dict[str, str | None] = {}
    for name in contigs:
        names = names_of(name, aliases)
        if options.exclude is not None and any(re.fullmatch(options.exclude, form) for form in names):
            kinds[name] = BY_PATTERN
        elif options.include is not None:
            kinds[name] = None if any(re.fullmatch(options.include, form) for form in names) else BY_PATTERN
        elif options.contigs == "all":
            kinds[name] = None
        elif name in aliases.kinds:
            kinds[name] = aliases.kinds[name]
        else:
            kinds[name] = organelles.kind(name, titles.get(name, "")) or kind_by_name(name)
    return kinds


def kind_by_name(name: str) -> str | None:
    """The kind that a contig's name tells (not for organelles); None where it tells nothing, as for chromosomes."""
    return next((kind for kind, pattern in _COMPILED.items() if pattern.fullmatch(name)), None)


def _forms(name: str) -> tuple[str, ...]:
    bare = name[3:] if name.lower().startswith("chr") else name
    mitochondrial = ("chrM", "MT", "M", "chrMT") if bare in ("M", "MT") else ()
    return (name, bare, f"chr{bare}", f"Chr{bare}", *mitochondrial)
