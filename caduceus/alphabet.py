"""The DNA alphabet: bytes, their complements, and the vocabularies that published models have of it.

A model's vocabulary, found by its number of tokens, says which token a base is and which token complements it; inputs,
masks and labels follow it. Tables are 256-entry numpy arrays indexed by byte, so that encoding and reverse
complementing are one gather each.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

IGNORE_LABEL = -100
"""Label of a position that is not predicted, in every vocabulary."""

_IUPAC = b"ACGTURYSWKMBDHVN"
_IUPAC_COMPLEMENT = b"TGCAAYRSWMKVHDBN"


def _complement_bytes() -> np.ndarray:
    table = np.arange(256, dtype=np.uint8)
    for base, complement in zip(_IUPAC, _IUPAC_COMPLEMENT, strict=True):
        table[base] = complement
        table[base + 32] = complement + 32  # ASCII lower case: soft-masking survives the reverse complement
    return table


COMPLEMENT_BYTE = _complement_bytes()
"""(256,) uint8: IUPAC complement of a base byte, case kept."""
IS_ACGT_BYTE = np.isin(np.arange(256, dtype=np.uint8), np.frombuffer(b"ACGTacgt", np.uint8))
"""(256,) bool: the bytes that can be labels."""
IS_URACIL_BYTE = np.isin(np.arange(256, dtype=np.uint8), np.frombuffer(b"Uu", np.uint8))
"""(256,) bool: the bytes of RNA that stand for T."""
IS_IUPAC_BYTE = np.isin(np.arange(256, dtype=np.uint8), np.frombuffer(_IUPAC + _IUPAC.lower(), np.uint8))
"""(256,) bool: the bytes a genome may hold."""


def reverse_complement(bases: np.ndarray) -> np.ndarray:
    """Reverse complement of ASCII bases, (L,) uint8 -> (L,) uint8, case kept."""
    return COMPLEMENT_BYTE[bases[::-1]]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a published model. The bases A, C, G, T have four consecutive ids, the highest ids of inputs."""

    name: str
    tokens: tuple[str, ...]
    """Indexed by id. A model's table may have more rows, which are padding; each of them is its own complement."""
    n: str
    """The token that N is shown as; IUPAC codes other than A, C, G, T and N are shown as [UNK]."""

    @property
    def mask(self) -> int:
        return self.tokens.index("[MASK]")

    @property
    def pad(self) -> int:
        return self.tokens.index("[PAD]")

    @property
    def unk(self) -> int:
        return self.tokens.index("[UNK]")

    @cached_property
    def bases(self) -> tuple[int, int, int, int]:
        """Ids of A, C, G and T."""
        a = [token.upper() for token in self.tokens].index("A")
        return a, a + 1, a + 2, a + 3

    @cached_property
    def of_byte(self) -> np.ndarray:
        """(256,) uint8: input token of a base byte, whatever its case."""
        table = np.full(256, self.unk, dtype=np.uint8)
        for byte, token in zip(b"ACGTN", (*self.bases, self.tokens.index(self.n)), strict=True):
            table[byte] = table[byte + 32] = token
        return table

    def encode(self, bases: np.ndarray) -> np.ndarray:
        """Token ids of ASCII bases, (L,) uint8 -> (L,) uint8."""
        return self.of_byte[bases]

    def complement(self, rows: int) -> np.ndarray:
        """Complement of every token id, (rows,) int64: swaps A/T and C/G, everything else maps to itself."""
        table = np.arange(rows, dtype=np.int64)
        table[list(self.bases)] = self.bases[::-1]
        return table


CADUCEUS = Vocabulary(
    "caduceus", ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN"), n="[PAD]"
)
"""The vocabulary of the published Caduceus; N stands as [PAD], as in its training."""
PLANTCAD = Vocabulary("plantcad", ("[PAD]", "[MASK]", "[UNK]", *"acgt"), n="[UNK]")
"""The vocabulary of the published PlantCaduceus and PlantCAD2."""
VOCABULARIES = {12: CADUCEUS, 8: PLANTCAD}
"""Vocabularies by `model.vocab_size`, as published: PlantCAD's size counts one row without a token."""
