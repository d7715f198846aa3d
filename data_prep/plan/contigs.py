"""Which contigs of a genome are used, and which are left out by rule or by the user's patterns."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from caduceus.errors import UserError
from data_prep.plan.aliases import AliasTable
from data_prep.plan.options import PlanOptions

_MITOCHONDRIA = (  # RefSeq accessions, whose names do not say what they are
    "NC_012920|NC_001807"  # human, of GRCh38 and hg19
    "|NC_005089|NC_001665|NC_024511|NC_001328|NC_001224"  # mouse, rat, D. melanogaster, C. elegans, S. cerevisiae
    "|NC_037304|NC_001284|NC_002333|NC_040902|NC_053523"  # A. thaliana (2), zebrafish, chicken (2)
)
_PLASTIDS = "NC_000932|NC_001320|NC_001666|NC_002762"  # A. thaliana, rice, maize, wheat

# The first rule that matches the whole name decides.
_RULES = {
    "mitochondrion": rf"(chr)?(m|mt|mito|mitochondrion)(_genome|dna)?|({_MITOCHONDRIA})(\.\d+)?",
    "plastid": rf"(chr)?(c|pt|pltd|plastid|chloroplast)(_genome|dna)?|({_PLASTIDS})(\.\d+)?",
    "EBV": r"(chr)?ebv|NC_007605(\.\d+)?",
    "decoy": r"hs37d5|hs38d1|.*_decoy",
    "alt": r".*_(alt|fix|novel|patch)|.*_hap\d+|HLA-.*|HSCHR.*|HG\d+.*_PATCH",
    "random": r".*_(random|unlocalized)|chr.*random",
    "unplaced": r"(chr)?un([_.-].*)?|(chr)?u(extra)?|(GL|KI|JH|GJ)\d{6}([.v]\d+)?|.*(scaffold|unplaced).*"
    r"|N[TW]_(?!03377[789]|037436)\d+(\.\d+)?",  # not the arms of D. melanogaster's chromosomes 2 and 3
}
_COMPILED = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in _RULES.items()}
_HEADERS = {
    kind: re.compile(pattern, re.IGNORECASE)
    for kind, pattern in {
        "mitochondrion": r"\b(mitochondrion|mitochondrial (genome|dna))\b",
        "plastid": r"\b(chloroplast|plastid)\b",
    }.items()
}
_PATTERN = "left out by pattern"


@dataclass(frozen=True)
class Selection:
    """`used`: the contigs to shard, in the file's order. `left_out`: kind -> contigs; both name -> length."""

    used: dict[str, int]
    left_out: dict[str, dict[str, int]]
    aliases: AliasTable

    def find(self, name: str) -> str | None:
        """The used contig that `name` means, by itself, by the alias table, or with `chr` added or taken away."""
        return self._find(name, self.used)

    def kind_of_left_out(self, name: str) -> str | None:
        """Why the contig that `name` means is left out; None where it is used or unknown."""
        return next((kind for kind, contigs in self.left_out.items() if self._find(name, contigs)), None)

    def _find(self, name: str, contigs: Mapping[str, int]) -> str | None:
        forms = (form for known in names_of(name, self.aliases) for form in _forms(known))
        return next((form for form in forms if form in contigs), None)


def names_of(name: str, aliases: AliasTable) -> tuple[str, ...]:
    """All names of a contig that the table knows, itself first."""
    return tuple(dict.fromkeys((name, *aliases.groups.get(name, ()))))


def kind_of(name: str, description: str = "") -> str | None:
    """Why a contig is left out by default, from its name and FASTA header; None where it is used."""
    by_name = (kind for kind, pattern in _COMPILED.items() if pattern.fullmatch(name))
    by_header = (kind for kind, pattern in _HEADERS.items() if pattern.search(description))
    return next(by_name, None) or next(by_header, None)


def select_contigs(
    contigs: Mapping[str, int], descriptions: Mapping[str, str], options: PlanOptions, aliases: AliasTable
) -> Selection:
    """Apply `--include` and `--exclude`, which match whole names; without `--include` the default rules apply.

    An assembly of nothing but scaffolds keeps them: `unplaced` is left out only beside contigs that are used.
    """
    kinds = {name: _kind(name, descriptions.get(name, ""), options, aliases) for name in contigs}
    if all(kinds.values()):
        kinds = {name: None if kind == "unplaced" else kind for name, kind in kinds.items()}
    used = {name: length for name, length in contigs.items() if kinds[name] is None}
    left_out: dict[str, dict[str, int]] = {}
    for name, length in contigs.items():
        kind = kinds[name]
        if kind is not None:
            left_out.setdefault(kind, {})[name] = length
    if not used:
        names = ", ".join(list(contigs)[:5])
        counts = ", ".join(f"{len(group)} {kind}" for kind, group in left_out.items())
        raise UserError(
            f"none of the {len(contigs)} contigs ({names}{', …' if len(contigs) > 5 else ''}) is used: {counts}; "
            "--include takes a pattern of whole names"
        )
    return Selection(used, left_out, aliases)


def _forms(name: str) -> tuple[str, ...]:
    bare = name[3:] if name.lower().startswith("chr") else name
    mitochondrial = ("chrM", "MT", "M", "chrMT") if bare in ("M", "MT") else ()
    return (name, bare, f"chr{bare}", f"Chr{bare}", *mitochondrial)


def _kind(name: str, description: str, options: PlanOptions, aliases: AliasTable) -> str | None:
    names = names_of(name, aliases)
    if options.exclude is not None and any(re.fullmatch(options.exclude, form) for form in names):
        return _PATTERN
    if options.include is not None:
        return None if any(re.fullmatch(options.include, form) for form in names) else _PATTERN
    if name in aliases.kinds:
        return aliases.kinds[name]
    return kind_of(name, description)
