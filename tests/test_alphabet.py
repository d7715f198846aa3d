import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caduceus import alphabet
from caduceus.alphabet import CADUCEUS, PLANTCAD, VOCABULARIES, Vocabulary

IUPAC = "ACGTRYSWKMBDHVNacgtryswkmbdhvn"
COMPLEMENTS = dict(zip("ACGTRYSWKMBDHVN", "TGCAYRSWMKVHDBN", strict=True))
COMPLEMENTS |= {base.lower(): complement.lower() for base, complement in COMPLEMENTS.items()}
both = pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=lambda vocabulary: vocabulary.name)


def as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


@given(st.text(alphabet=IUPAC))
def test_reverse_complement_equals_a_string_implementation(text: str) -> None:
    expected = "".join(COMPLEMENTS[base] for base in reversed(text))
    assert alphabet.reverse_complement(as_bytes(text)).tobytes().decode() == expected


@both
@given(text=st.text(alphabet="ACGTNacgtn"))
def test_complementing_commutes_with_encoding(vocabulary: Vocabulary, text: str) -> None:
    bases = as_bytes(text)
    complemented = vocabulary.complement(16)[vocabulary.encode(bases)]
    assert np.array_equal(complemented, vocabulary.encode(alphabet.COMPLEMENT_BYTE[bases]))


def test_token_ids_are_the_published_ones() -> None:
    assert CADUCEUS.encode(as_bytes("ACGTacgt")).tolist() == [7, 8, 9, 10] * 2
    assert CADUCEUS.encode(as_bytes("Nn")).tolist() == [4, 4], "N stands as [PAD] in the input"
    assert CADUCEUS.encode(as_bytes("RYSWKMBDHV")).tolist() == [6] * 10
    assert (CADUCEUS.mask, CADUCEUS.pad, CADUCEUS.unk, len(CADUCEUS.tokens)) == (3, 4, 6, 12)
    assert PLANTCAD.encode(as_bytes("ACGTacgt")).tolist() == [3, 4, 5, 6] * 2
    assert PLANTCAD.encode(as_bytes("NnRYSWKMBDHV")).tolist() == [2] * 12
    assert (PLANTCAD.mask, PLANTCAD.pad, PLANTCAD.unk, len(PLANTCAD.tokens)) == (1, 0, 2, 7)


def test_the_complement_swaps_only_the_four_bases() -> None:
    assert CADUCEUS.complement(16).tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15]
    assert PLANTCAD.complement(8).tolist() == [0, 1, 2, 6, 5, 4, 3, 7]


@both
def test_no_token_of_an_input_comes_after_the_bases(vocabulary: Vocabulary) -> None:
    assert vocabulary.of_byte.max() == vocabulary.bases[-1]


def test_only_acgt_can_be_labels() -> None:
    assert bytes(np.flatnonzero(alphabet.IS_ACGT_BYTE).astype(np.uint8)) == b"ACGTacgt"
