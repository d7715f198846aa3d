"""What a variant is: left-aligned, of a kind, or without a score, and REF as the genome has it."""

from pathlib import Path

import numpy as np
import pytest

from caduceus.errors import UserError
from caduceus.evaluate.alleles import Allele, left_aligned, prepare
from caduceus.evaluate.variant_inputs import OwnSequences, VariantSource

GENOME = "GATTACACACAGTNNRACGTTTTTG"


def genome(text: str = GENOME) -> OwnSequences:
    return OwnSequences([np.frombuffer(text.encode(), np.uint8)], [0])


def allele(pos: int, ref: str, alt: str) -> Allele:
    return Allele("0", pos, ref, alt, "file:1")


KINDS = {
    (1, "G", "C"): ("snv", 0, "G", "C"),
    (2, "at", "ag"): ("snv", 2, "T", "G"),
    (3, "U", "c"): ("snv", 2, "T", "C"),
    (2, "a", "u"): ("snv", 1, "A", "T"),
    (2, "ATT", "CTG"): ("mnv", 1, "ATT", "CTG"),
    (9, "ACA", "A"): ("indel", 4, "AC", ""),  # vt would write T ACA -> T A, before the base that it keeps
    (11, "A", "ACA"): ("indel", 4, "", "AC"),
    (24, "T", "TT"): ("indel", 19, "", "T"),
    (2, "A", "<DEL>"): "symbolic",
    (2, "A", "<*>"): "symbolic",
    (2, "A", "*"): "spanning deletion",
    (2, "A", "A[chr2:5["): "breakend",
    (2, "A", ".C"): "breakend",
    (2, "A", "."): "no alternative",
    (2, "A", "N"): "not ACGT",
    (14, "A", "C"): "not ACGT",
    (2, "A", "a"): "same as REF",
    (3, "T", "u"): "same as REF",
}


@pytest.mark.parametrize("given", KINDS, ids=str)
def test_kinds(given: tuple[int, str, str]) -> None:
    (variant,) = prepare([allele(*given)], genome())
    expected = KINDS[given]
    if isinstance(expected, str):
        assert (variant.kind, variant.note) == (None, expected)
    else:
        assert (variant.kind, variant.start, variant.ref, variant.alt) == expected


def test_left_alignment_finds_the_leftmost_of_all_equal_variants() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("AC"), 30))
        start, length = int(rng.integers(1, 20)), int(rng.integers(1, 5))
        deletes = rng.random() < 0.5
        inserted = "".join(rng.choice(list("AC"), length))
        ref, alt = (text[start : start + length + 1], text[start]) if deletes else (text[start], text[start] + inserted)
        changed = text[:start] + alt + text[start + len(ref) :]
        found = left_aligned(genome(text), "0", start, ref, alt)
        at, new_ref, new_alt = found
        assert text[:at] + new_alt + text[at + len(new_ref) :] == changed and text[at:].startswith(new_ref)
        equal = [
            place
            for place in range(len(text) - length + 1)
            if (deletes and text[:place] + text[place + length :] == changed)
            or (not deletes and text[:place] + changed[place : place + length] + text[place:] == changed)
        ]
        assert at == max(min(equal) - 1, 0) and min(len(new_ref), len(new_alt)) == 1, (text, start, ref, alt, found)


def test_vt_aligns_alike(shared_data: Path) -> None:
    folder, chromosome = shared_data / "variants" / "odd_vcf", shared_data / "human" / "20.fa.gz"
    variants = []
    for name in ("vt_normalize_01_IN.vcf.gz", "vt_normalize_01_OUT.vcf.gz"):
        file = VariantSource(folder / name, chromosome).read()
        variants.append(sorted(prepare(file.alleles, file.genome), key=str))
        if "OUT" in name:
            for a in file.alleles:
                assert left_aligned(file.genome, "20", a.pos - 1, a.ref, a.alt) == (a.pos - 1, a.ref, a.alt)
    assert variants[0] == variants[1] and len(variants[0]) == 194


def test_a_ref_that_is_not_the_genomes_is_refused_skipped_or_swapped() -> None:
    alleles = [allele(1, "G", "C"), allele(2, "G", "A"), allele(2, "G", "C"), allele(26, "A", "C")]
    with pytest.raises(UserError, match=r"file:1: REF is G at 0:2, but the genome has A there; 3 of 4 .* assembly"):
        prepare(alleles, genome())
    with pytest.raises(UserError, match=r"0:26, but 0 has 25 bases; 1 of 4") as caught:
        prepare([alleles[0]] * 3 + alleles[3:], genome())
    assert "assembly" not in str(caught.value)
    skipped = prepare(alleles, genome(), "skip")
    assert [variant.note for variant in skipped] == ["", *["REF mismatch"] * 3]
    swapped = prepare(alleles, genome(), "swap")
    assert [variant.note for variant in swapped] == ["", "", "REF mismatch", "REF mismatch"]
    assert (swapped[1].swapped, swapped[1].ref, swapped[1].alt) == (True, "A", "G")
