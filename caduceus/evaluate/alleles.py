"""Variants as files give them, and in the form that is scored: checked against the genome, left-aligned, with a kind.

Imports no torch.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.windows import allele_bases

MISMATCHES = ("refuse", "skip", "swap")
"""What to do where REF differs from the genome: refuse; leave the allele out; or, where ALT agrees, swap the two."""
_BASES = re.compile("[ACGT]+")
_STEP = 64


class BasesOf(Protocol):
    """A reader of a genome's bases, or of sequences that come with the variants."""

    contigs: dict[str, int]

    def read(self, contig: str, start: int, end: int) -> np.ndarray: ...

    def find(self, name: str) -> str | None: ...


@dataclass(frozen=True)
class Allele:
    """One alternative allele as in the file; `pos` counts from 1. `place` names it in error messages."""

    contig: str
    pos: int
    ref: str
    alt: str
    place: str


@dataclass(frozen=True)
class Variant:
    """A variant to score: `alt` replaces `ref` at 0-based `start`, without bases that both share at an end.

    Insertions and deletions are left-aligned. swapped: the file has the alleles the other way round, so the sign of the
    score must be reversed. kind: snv, mnv or indel; None where there is no score, and `note` says why.
    """

    contig: str
    start: int
    ref: str
    alt: str
    kind: str | None
    swapped: bool = False
    note: str = ""


def prepare(
    alleles: Iterable[Allele], genome: BasesOf, mismatch: str = "refuse", allow_unknown_contigs: bool = False
) -> list[Variant]:
    """The variants of alleles, in their order. Raises `UserError` for a contig that the genome lacks, unless
    allowed.
    """
    variants, mismatched, checked = [], [], 0
    for allele in alleles:
        contig = genome.find(allele.contig)
        if contig is None and not allow_unknown_contigs:
            known = ", ".join(list(genome.contigs)[:5]) + (", …" if len(genome.contigs) > 5 else "")
            raise UserError(
                f"{allele.place}: the genome has no contig {allele.contig!r}, but {known}; --aliases takes a table of "
                "names, --allow-unknown-contigs leaves such variants out"
            )
        variant = _skipped(allele, contig) or _checked(allele, contig, genome)
        if variant.kind or variant.note == "REF mismatch":
            checked += 1
        if variant.note == "REF mismatch" or variant.swapped:
            mismatched.append(allele)
            if mismatch != "swap" and variant.swapped:
                variant = _without_score(allele, contig, "REF mismatch")
        variants.append(variant)
    if mismatched and mismatch == "refuse":
        raise UserError(_describe_mismatches(mismatched, checked, genome))
    return variants


def _describe_mismatches(mismatched: list[Allele], checked: int, genome: BasesOf) -> str:
    first = mismatched[0]
    contig, start = genome.find(first.contig), first.pos - 1
    if start >= genome.contigs[contig] or start < 0:
        there = f"{contig} has {genome.contigs[contig]:,} bases"
    else:
        there = f"the genome has {genome.read(contig, start, start + len(first.ref)).tobytes().decode()[:20]} there"
    other = "; it may be for another assembly" if 2 * len(mismatched) > checked else ""
    return (
        f"{first.place}: REF is {first.ref[:20]} at {first.contig}:{first.pos}, but {there}; {len(mismatched):,} of "
        f"{checked:,} REF alleles differ from the genome{other}; --ref-mismatch skip leaves such out, swap also scores "
        "those whose ALT is in the genome"
    )


def _skipped(allele: Allele, contig: str | None) -> Variant | None:
    """The variant without a score, for an allele whose text alone shows that it gets none; else None."""
    alt = allele.alt
    if contig is None:
        note = "unknown contig"
    elif alt == "*":
        note = "spanning deletion"
    elif "[" in alt or "]" in alt or (len(alt) > 1 and "." in (alt[0], alt[-1])):
        note = "breakend"
    elif alt.startswith("<"):
        note = "symbolic"
    elif alt in (".", ""):
        note = "no alternative"
    elif not _BASES.fullmatch(allele_bases(alt)) or not _BASES.fullmatch(allele_bases(allele.ref)):
        note = "not ACGT"
    elif allele_bases(alt) == allele_bases(allele.ref):
        note = "same as REF"
    else:
        return None
    return _without_score(allele, contig or allele.contig, note)


def _without_score(allele: Allele, contig: str, note: str) -> Variant:
    return Variant(contig, allele.pos - 1, allele.ref, allele.alt, None, note=note)


def _checked(allele: Allele, contig: str, genome: BasesOf) -> Variant:
    start, ref, alt = allele.pos - 1, allele_bases(allele.ref), allele_bases(allele.alt)
    if start < 0 or start + len(ref) > genome.contigs[contig]:
        return _without_score(allele, contig, "REF mismatch")
    there = genome.read(contig, start, start + max(len(ref), len(alt))).tobytes().decode()
    if there[: len(ref)] == ref:
        return _of_kind(contig, *left_aligned(genome, contig, start, ref, alt), swapped=False)
    if not _BASES.fullmatch(there[: len(ref)]):
        return _without_score(allele, contig, "not ACGT")
    if there[: len(alt)] == alt:
        return _of_kind(contig, *left_aligned(genome, contig, start, alt, ref), swapped=True)
    return _without_score(allele, contig, "REF mismatch")


def _of_kind(contig: str, start: int, ref: str, alt: str, swapped: bool) -> Variant:
    while ref and alt and ref[0] == alt[0]:
        start, ref, alt = start + 1, ref[1:], alt[1:]
    while ref and alt and ref[-1] == alt[-1]:
        ref, alt = ref[:-1], alt[:-1]
    kind = "indel" if len(ref) != len(alt) else "snv" if len(ref) == 1 else "mnv"
    return Variant(contig, start, ref, alt, kind, swapped)


def left_aligned(genome: BasesOf, contig: str, start: int, ref: str, alt: str) -> tuple[int, str, str]:
    """(start, ref, alt), left-aligned and as short as possible, neither empty (Tan et al. 2015: normalised
    as by vt).
    """
    before = _backwards(genome, contig, start)
    while ref[-1] == alt[-1] and (start > 0 or (len(ref) > 1 and len(alt) > 1)):
        ref, alt = ref[:-1], alt[:-1]
        if not ref or not alt:
            base = next(before)
            start, ref, alt = start - 1, base + ref, base + alt
    while len(ref) > 1 and len(alt) > 1 and ref[0] == alt[0]:
        start, ref, alt = start + 1, ref[1:], alt[1:]
    return start, ref, alt


def _backwards(genome: BasesOf, contig: str, start: int) -> Iterator[str]:
    """Yield the bases before `start`, the nearest first."""
    for end in range(start, 0, -_STEP):
        yield from reversed(genome.read(contig, max(end - _STEP, 0), end).tobytes().decode())
