import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from caduceus import alphabet

IUPAC = "ACGTRYSWKMBDHVNacgtryswkmbdhvn"
COMPLEMENTS = dict(zip("ACGTRYSWKMBDHVN", "TGCAYRSWMKVHDBN", strict=True))
COMPLEMENTS |= {base.lower(): complement.lower() for base, complement in COMPLEMENTS.items()}


def as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


@given(st.text(alphabet=IUPAC))
def test_reverse_complement_equals_a_string_implementation(text: str) -> None:
    expected = "".join(COMPLEMENTS[base] for base in reversed(text))
    assert alphabet.reverse_complement(as_bytes(text)).tobytes().decode() == expected


@given(st.text(alphabet="ACGTNacgtn"))
def test_complementing_commutes_with_encoding(text: str) -> None:
    bases = as_bytes(text)
    complemented = alphabet.COMPLEMENT_TOKEN[alphabet.encode(bases)]
    assert np.array_equal(complemented, alphabet.encode(alphabet.COMPLEMENT_BYTE[bases]))


def test_token_ids_are_the_published_ones() -> None:
    assert alphabet.encode(as_bytes("ACGTacgt")).tolist() == [7, 8, 9, 10] * 2
    assert alphabet.encode(as_bytes("Nn")).tolist() == [4, 4], "N stands as [PAD] in the input"
    assert alphabet.encode(as_bytes("RYSWKMBDHV")).tolist() == [6] * 10
    assert alphabet.TOKENS[3] == "[MASK]" and len(alphabet.TOKENS) == alphabet.VOCAB_SIZE == 12


def test_complement_map_swaps_only_the_four_bases() -> None:
    table = alphabet.complement_map(16)
    assert table.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 12, 13, 14, 15]
    assert np.array_equal(table[table], np.arange(16))


def test_only_acgt_can_be_labels() -> None:
    assert bytes(np.flatnonzero(alphabet.IS_ACGT_BYTE).astype(np.uint8)) == b"ACGTacgt"
