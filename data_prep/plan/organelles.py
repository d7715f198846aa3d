"""Which contigs are genomes of mitochondria and plastids: told by name, title, length and the contigs beside them."""

import re
from collections.abc import Collection
from dataclasses import dataclass

_SHARE_OF_LONGEST = 0.25
"""What a single letter may name at most as an organelle, of the longest contig."""
# Sequences of the nucleus, or of unknown origin, that are about organelles.
_ABOUT = re.compile(
    r"similar to|resembl|-like\b|\blike\b|-derived|derived from|-related|related to|homolog|nuclear|\bnu[mp]ts?\b"
    r"|insert|pseudogene|\bgene\b|protein|mrna|cdna|integrat|contaminat|putative|possible"
    r"|chromosome \w+[,:]? .*(contain|with) ",
    re.IGNORECASE,
)
# How a title goes on where its words say what the sequence is.
_NEXT_WORDS = "complete|partial|circular|genome|isolate|strain|cultivar|breed|contig|scaffold|dna"
_END = rf"\b(?=\W*$|\s*[,;:|\])]|\s+({_NEXT_WORDS})\b)"


@dataclass(frozen=True)
class _Organelle:
    names: re.Pattern[str]  # that no chromosome has
    letter: str  # that a chromosome may have as well
    title: re.Pattern[str]
    longest: int  # bases of the longest known genome of the kind, rounded up


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


_ORGANELLES = {
    "mitochondrion": _Organelle(
        _pattern(
            r"chrm|(chr)?(mt|mito|mitochondrion)([_-]?(genome|dna))?|mitochondrion_genome"
            r"|(NC_012920|NC_001807"  # RefSeq's names do not say what they are: human, of GRCh38 and hg19
            r"|NC_005089|NC_001665|NC_024511|NC_001328|NC_001224"  # mouse, rat, D. melanogaster, C. elegans, yeast
            r"|NC_037304|NC_001284|NC_002333|NC_040902|NC_053523)(\.\d+)?"  # A. thaliana (2), zebrafish, chicken (2)
        ),
        "m",
        _pattern(
            rf"\bmitochondri(on|al (genome|dna|chromosome|sequence)){_END}|(organelle|location)\s*[=:]\s*mitochondri"
            r"|^MT dna:"
        ),
        12_000_000,
    ),
    "plastid": _Organelle(
        _pattern(
            r"(chr)?(pt|pltd|plastid|chloroplast|apicoplast)([_-]?(genome|dna))?"
            r"|(NC_000932|NC_001320|NC_001666|NC_002762)(\.\d+)?"  # A. thaliana, rice, maize, wheat
        ),
        "c",
        _pattern(
            rf"\b(chloroplast|plastid|apicoplast)( (genome|dna|chromosome|sequence))?{_END}"
            r"|(organelle|location)\s*[=:]\s*(chloroplast|plastid|apicoplast)|^Pt dna:"
        ),
        3_000_000,
    ),
}


def organelle_of(name: str, title: str, length: int, longest: int, contigs: Collection[str]) -> str | None:
    """The organelle that a contig of `length` bases is the genome of; None for anything else.

    `title` is the whole header, `longest` the length of the genome's longest contig, `contigs` all their names. A title
    that says so, or a name that no chromosome has, is enough for a sequence of a fitting length. A name of one letter
    is, where no chromosome has a letter beside it and the sequence is far shorter than the longest.
    """
    bare = re.sub(r"^chr", "", name, flags=re.IGNORECASE)
    for kind, organelle in _ORGANELLES.items():
        if length > organelle.longest:
            continue
        if organelle.title.search(title) and not _ABOUT.search(title):
            return kind
        is_lettered = bare.lower() == organelle.letter
        if is_lettered and _has_neighbour_letter(name, contigs):
            continue
        if organelle.names.fullmatch(name) or (is_lettered and length <= _SHARE_OF_LONGEST * longest):
            return kind
    return None


def _has_neighbour_letter(name: str, contigs: Collection[str]) -> bool:
    """Whether a contig is named by the letter before or after this one's, as chromosomes A to F are."""
    stem, letter = name[:-1], name[-1]
    return any(stem + chr(ord(letter) + step) in contigs for step in (-1, 1))
