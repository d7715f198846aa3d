"""The DNA alphabet: token ids, complements, and the tables between bytes, tokens and reverse complements.

Token ids are those of the published Caduceus tokenizer. All tables are 256-entry numpy arrays indexed by byte,
so that encoding and reverse complementing are one gather each.
"""

import numpy as np

CLS, SEP, BOS, MASK, PAD, RESERVED, UNK = range(7)
A, C, G, T, N = range(7, 12)
VOCAB_SIZE = 12
TOKENS = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")
BASE_TOKENS = (A, C, G, T)
IGNORE_LABEL = PAD
"""Label of a position that is not predicted; the published code uses the id of [PAD]."""

_IUPAC = b"ACGTURYSWKMBDHVN"
_IUPAC_COMPLEMENT = b"TGCAAYRSWMKVHDBN"


def _complement_bytes() -> np.ndarray:
    table = np.arange(256, dtype=np.uint8)
    for base, complement in zip(_IUPAC, _IUPAC_COMPLEMENT, strict=True):
        table[base] = complement
        table[base + 32] = complement + 32  # ASCII lower case: soft-masking survives the reverse complement
    return table


def _byte_to_token() -> np.ndarray:
    table = np.full(256, UNK, dtype=np.uint8)
    for byte, token in zip(b"ACGTN", (A, C, G, T, PAD), strict=True):
        table[byte] = table[byte + 32] = token
    return table


def complement_map(vocab_size: int) -> np.ndarray:
    """Complement of every token id, (vocab_size,) int64: swaps A/T and C/G, everything else maps to itself."""
    table = np.arange(vocab_size, dtype=np.int64)
    table[[A, C, G, T]] = [T, G, C, A]
    return table


COMPLEMENT_BYTE = _complement_bytes()
"""(256,) uint8: IUPAC complement of a base byte, case kept."""
BYTE_TO_TOKEN = _byte_to_token()
"""(256,) uint8: input token of a base byte. N stands as [PAD], as in the published training; other codes as [UNK]."""
COMPLEMENT_TOKEN = complement_map(VOCAB_SIZE)
"""(12,) int64: complement of a token."""
IS_ACGT_BYTE = np.isin(np.arange(256, dtype=np.uint8), np.frombuffer(b"ACGTacgt", np.uint8))
"""(256,) bool: the bytes that can be labels."""
IS_IUPAC_BYTE = np.isin(np.arange(256, dtype=np.uint8), np.frombuffer(_IUPAC + _IUPAC.lower(), np.uint8))
"""(256,) bool: the bytes a genome may hold."""


def reverse_complement(bases: np.ndarray) -> np.ndarray:
    """Reverse complement of ASCII bases, (L,) uint8 -> (L,) uint8, case kept."""
    return COMPLEMENT_BYTE[bases[::-1]]


def encode(bases: np.ndarray) -> np.ndarray:
    """Token ids of ASCII bases, (L,) uint8 -> (L,) uint8."""
    return BYTE_TO_TOKEN[bases]
