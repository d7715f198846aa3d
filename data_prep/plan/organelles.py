"""Finds the genomes of mitochondria and plastids among contigs, by name, title, length and the other contigs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_SHARE_OF_LONGEST = 0.25
"""Largest length of an organelle that is named by a single letter and has an unusual length, as a share of the longest
contig.
"""
_SHARE_OF_BASES = 0.5
"""Largest length of an organelle that is named by a single letter and has a usual length, as a share of all bases."""
_NOT_OF_A_SERIES = frozenset("mcpuwxyziv")
"""Letters that can mean an organelle, a sex chromosome, an unplaced contig or a Roman number."""
# Sequences of the nucleus, or of unknown origin, that are about organelles.
_ABOUT = re.compile(
    r"similar to|resembl|-like\b|\blike\b|-derived|derived from|-related|related to|homolog|nuclear|\bnu[mp]ts?\b"
    r"|insert|pseudogene|\bgene\b|protein|mrna|cdna|integrat|contaminat|putative|possible"
    r"|chromosome \w+[,:]? .*(contain|with) ",
    re.IGNORECASE,
)
# How a title may go on after words that say what the sequence is.
_NEXT_WORDS = "complete|partial|circular|genome|isolate|strain|cultivar|breed|contig|scaffold|dna"
_END = rf"\b(?=\W*$|\s*[,;:|\])]|\s+({_NEXT_WORDS})\b)"


@dataclass(frozen=True)
class _Organelle:
    names: re.Pattern[str]  # names that no chromosome has
    letter: str  # names that a chromosome may have as well
    shortest: int  # bases of the shortest known genome of the kind, rounded down
    usual: range  # lengths of nearly all genomes of the kind, in bases
    title: re.Pattern[str]
    longest: int  # bases of the longest known genome of the kind, rounded up


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


_ORGANELLES = {
    "mitochondrion": _Organelle(
        _pattern(
            r"chrm|(chr)?(mt|mito|mitochondrion)([_-]?(genome|dna))?|mitochondrion_genome"
            r"|(NC_012920|NC_001807"  # RefSeq's names do not tell: human, of GRCh38 and hg19
            r"|NC_005089|NC_001665|NC_024511|NC_001328|NC_001224"  # mouse, rat, D. melanogaster, C. elegans, yeast
            r"|NC_037304|NC_001284|NC_002333|NC_040902|NC_053523)(\.\d+)?"  # A. thaliana (2), zebrafish, chicken (2)
        ),
        "m",
        5_900,
        range(10_000, 2_000_001),
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
        11_000,
        range(100_000, 220_001),
        _pattern(
            rf"\b(chloroplast|plastid|apicoplast)( (genome|dna|chromosome|sequence))?{_END}"
            r"|(organelle|location)\s*[=:]\s*(chloroplast|plastid|apicoplast)|^Pt dna:"
        ),
        3_000_000,
    ),
}


class OrganelleFinder:
    """Recognises the organelles among the `contigs` (name -> length) of a genome."""

    def __init__(self, contigs: Mapping[str, int]) -> None:
        self._contigs = contigs
        self._longest = max(contigs.values(), default=0)
        self._bases = sum(contigs.values())
        self._letters = {bare for name in contigs if len(bare := _bare(name)) == 1 and bare.isalpha()}

    def kind(self, name: str, title: str) -> str | None:
        """The organelle whose genome a contig is; None for other contigs. `title`: the whole header.

        For a sequence of a fitting length, a title that says so, or a name that no chromosome has, is enough. A name of
        one letter is enough if neither the letters of other contigs nor the title make it a chromosome, and its length
        is usual for the organelle, or possible and far below that of the longest contig.
        """
        length, bare = self._contigs[name], _bare(name)
        for kind, organelle in _ORGANELLES.items():
            if length > organelle.longest:
                continue
            if organelle.title.search(title) and not _ABOUT.search(title):
                return kind
            is_lettered = bare == organelle.letter
            if is_lettered and self._has_lettered_chromosomes(bare):
                continue
            if organelle.names.fullmatch(name):
                return kind
            if is_lettered and not _is_titled_chromosome(bare, title) and self._fits(length, organelle):
                return kind
        return None

    def _fits(self, length: int, organelle: _Organelle) -> bool:
        """Whether the length, and its share of the genome, fit the organelle."""
        if length in organelle.usual and length <= _SHARE_OF_BASES * self._bases:
            return True
        return organelle.shortest <= length <= _SHARE_OF_LONGEST * self._longest

    def _has_lettered_chromosomes(self, letter: str) -> bool:
        """Whether chromosomes are named by letters, such as A to F: the neighbour of this letter is one, or two letters
        that mean nothing else.
        """
        neighbours = {chr(ord(letter) + step) for step in (-1, 1)}
        return bool(self._letters & neighbours) or len(self._letters - _NOT_OF_A_SERIES) > 1


def _bare(name: str) -> str:
    return name.lower().removeprefix("chr")


def _is_titled_chromosome(letter: str, title: str) -> bool:
    return re.search(rf"\bchromosome:? {letter}\b", title, re.IGNORECASE) is not None
