"""From stored bases to the inputs, labels and loss weights of `data.objective`, in one pass over the bytes.

Imports no torch.

Randomness is a hash of (the sample's key, the position), so any slice of a sample can be masked alone. Masking follows
the published training (Schiff et al. 2024): a share of the ACGT bases is labelled; most of them are shown as [MASK],
some as a random base, the rest unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np

from caduceus.alphabet import COMPLEMENT_BYTE, IGNORE_LABEL, IS_IUPAC_BYTE, Vocabulary
from caduceus.config import DataConfig

_INVALID = 255
_CHUNK = 1024
_PHASE = np.uint64(1 << 63)
"""A number that is no position. Its hash decides where the spans of a row begin, and its bit marks draws for the bases
within spans.
"""


class Tokens(NamedTuple):
    """A vocabulary in the form that the kernels take."""

    of_byte: np.ndarray
    """(2, 256) uint8: the token of a stored byte, and of its complement; a byte that no genome may hold is invalid."""
    mask: np.uint8
    first_base: np.uint8
    """Id of A. C, G and T have the next three ids, and no input token has a higher one."""

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "Tokens":
        as_stored = np.where(IS_IUPAC_BYTE, vocabulary.of_byte, _INVALID)
        complemented = np.where(IS_IUPAC_BYTE, vocabulary.of_byte[COMPLEMENT_BYTE], _INVALID)
        table = np.stack([as_stored, complemented]).astype(np.uint8)
        return cls(table, np.uint8(vocabulary.mask), np.uint8(vocabulary.bases[0]))


class Masking(NamedTuple):
    """Thresholds with which the kernel compares parts of the masking hash."""

    labelled: np.ndarray  # of the upper 32 bits, for all rows or (B,)
    shown_as_mask: np.uint64  # of 30 lower bits
    shown_as_mask_or_random: np.uint64
    span: np.uint64  # positions that share a draw

    @classmethod
    def of(
        cls, mask_prob: float | np.ndarray, mask_token_prob: float, random_token_prob: float, span: int = 1
    ) -> "Masking":
        """mask_prob: the share of ACGT bases that is labelled, a float or one for each row, (B,).

        mask_token_prob, random_token_prob: the shares of the labelled bases that are shown as [MASK] and as a random
        base. Bases are labelled in spans of `span` bases, and those of a span are shown alike.
        """
        return cls(
            np.rint(np.asarray(mask_prob) * 2**32).astype(np.uint64),
            np.uint64(round(mask_token_prob * 2**30)),
            np.uint64(round((mask_token_prob + random_token_prob) * 2**30)),
            np.uint64(span),
        )


@numba.njit(nogil=True, cache=True)
def _hash(key: np.uint64, position: np.uint64) -> np.uint64:
    x = key + position * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _mask(bases, mirrored, keys, first, masking, tokens, input_ids, labels):
    rows, length = bases.shape
    labelled, shown_as_mask, shown_as_mask_or_random, span = masking
    of_byte, mask, first_base = tokens
    invalid = np.zeros(rows, np.int64)
    # In chunks, so that hashing is a vector loop, and choosing positions has no branch that may be mispredicted.
    draws = np.empty(_CHUNK, np.uint64)
    chosen = np.empty(_CHUNK, np.int64)
    for row in range(rows):
        table = of_byte[1] if mirrored[row] else of_byte[0]
        source = bases[row, ::-1] if mirrored[row] else bases[row, ::1]
        phase = _hash(keys[row], _PHASE) % span
        for begin in range(0, length, _CHUNK):
            count = min(_CHUNK, length - begin)
            if span == 1:
                for i in range(count):
                    draws[i] = _hash(keys[row], np.uint64(first + begin + i))
            else:
                for i in range(count):
                    draws[i] = _hash(keys[row], (np.uint64(first + begin + i) + phase) // span)
            picked = 0
            for i in range(count):
                token = table[source[begin + i]]
                input_ids[row, begin + i] = token
                labels[row, begin + i] = IGNORE_LABEL
                invalid[row] += token == _INVALID
                chosen[picked] = i
                picked += (draws[i] >> np.uint64(32) < labelled[row]) & (token >= first_base)
            for i in chosen[:picked]:
                labels[row, begin + i] = input_ids[row, begin + i]
                kind = (draws[i] >> np.uint64(2)) & np.uint64(0x3FFFFFFF)
                if kind < shown_as_mask:
                    input_ids[row, begin + i] = mask
                elif kind < shown_as_mask_or_random:
                    base = draws[i] if span == 1 else _hash(keys[row] ^ _PHASE, np.uint64(first + begin + i))
                    input_ids[row, begin + i] = np.uint8(first_base + (base & np.uint64(3)))
    return invalid


@numba.njit(nogil=True, cache=True)
def _shift(bases, mirrored, tokens, input_ids, labels):
    rows, given = bases.shape
    length = input_ids.shape[1]
    of_byte, _, first_base = tokens
    invalid = np.zeros(rows, np.int64)
    for row in range(rows):
        table = of_byte[1] if mirrored[row] else of_byte[0]
        for i in range(given):
            token = table[bases[row, given - 1 - i if mirrored[row] else i]]
            if token == _INVALID:
                invalid[row] += 1
            if i < length:
                input_ids[row, i] = token
            if i > 0:
                labels[row, i - 1] = np.int8(token) if token >= first_base else np.int8(IGNORE_LABEL)
        if given == length:
            labels[row, length - 1] = IGNORE_LABEL
    return invalid


@numba.njit(nogil=True, cache=True)
def _weigh(bases, mirrored, shift, repeat_weight, weights):
    rows, given = bases.shape
    for row in range(rows):
        for i in range(weights.shape[1]):
            lower = False
            if i + shift < given:
                column = given - 1 - i - shift if mirrored[row] else i + shift
                lower = bases[row, column] & 0x20 != 0
            weights[row, i] = repeat_weight if lower else np.float32(1)


def mask_bases(
    bases: np.ndarray, mirrored: np.ndarray, keys: np.ndarray, first: int, masking: Masking, tokens: Tokens
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masked-base inputs and labels of positions first … first+L-1 of each sample.

    `bases` (B, L) uint8 as stored; rows with `mirrored` (B,) bool are read as their reverse complement, and positions
    then count along that. `keys` (B,) uint64. Returns `input_ids` (B, L) uint8, `labels` (B, L) int8 with
    `IGNORE_LABEL` where nothing is predicted, and the number (B,) of bytes that are not IUPAC codes.
    """
    input_ids, labels = np.empty(bases.shape, np.uint8), np.empty(bases.shape, np.int8)
    masking = masking._replace(labelled=np.array(np.broadcast_to(masking.labelled, len(bases))))
    invalid = _mask(bases, mirrored, keys, first, masking, tokens, input_ids, labels)
    return input_ids, labels, invalid


def shift_bases(
    bases: np.ndarray, mirrored: np.ndarray, length: int, tokens: Tokens
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Next-base inputs and labels of `length` positions; `bases` has one column more, or ends with the sample.

    Shapes and results are those of `mask_bases`, without masking: the label of a position is the base after it.
    """
    input_ids, labels = np.empty((len(bases), length), np.uint8), np.empty((len(bases), length), np.int8)
    invalid = _shift(bases, mirrored, tokens, input_ids, labels)
    return input_ids, labels, invalid


def weigh_repeats(bases: np.ndarray, mirrored: np.ndarray, length: int, shift: int, repeat_weight: float) -> np.ndarray:
    """Loss weights (B, length) float32: `repeat_weight` where the base `shift` to the right is soft-masked, else 1."""
    weights = np.empty((len(bases), length), np.float32)
    _weigh(bases, mirrored, shift, np.float32(repeat_weight), weights)
    return weights


@dataclass
class SampleArrays:
    """Tokens of B samples."""

    input_ids: np.ndarray
    """(B, L) uint8."""
    labels: np.ndarray
    """(B, L) int8, `IGNORE_LABEL` where nothing is predicted."""
    loss_weights: np.ndarray | None
    """(B, L) float32; None where all are 1."""
    g: np.ndarray
    """(B,) int64 sample numbers."""
    substituted: tuple[str, ...] = ()
    """One line for each sample that could not be read, with its substitute."""
    choices: np.ndarray | None = None
    """(B,) int64: the crop that was taken for each sample, 0 for its own, n for its n-th substitute; None where there
    is no choice.
    """
    repeats: np.ndarray | None = None
    """(B, L) bool, whether the base to be predicted is soft-masked; None unless `repeats` were asked for."""
    starts: np.ndarray | None = None
    """(B, L) bool, True at the first position of each sequence that is packed into a row; None where no row is packed.
    """


class Objective:
    """Makes tokens of samples, or of the slice `positions` (first, end) of each, in the model's vocabulary.

    `mask_rate`: sample numbers (B,) -> share of bases to
    label (B,); None is `data.mask_prob` for all.

    Attributes: `first` and `end` of the positions whose bases it needs. With next_base that is one position more than
    the slice, where the sample goes on: the last label is the base after the slice.
    """

    def __init__(
        self,
        data: DataConfig,
        vocabulary: Vocabulary,
        positions: tuple[int, int] | None = None,
        mask_rate: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._mask_rate = mask_rate
        self.first, end = positions or (0, data.seq_len)
        self._length = end - self.first
        self._shift = int(data.objective == "next_base")
        self.end = min(end + self._shift, data.seq_len)
        self._masking = Masking.of(data.mask_prob, data.mask_token_prob, data.random_token_prob, data.mask_span)
        self._tokens = Tokens.of(vocabulary)
        self._repeat_weight = data.repeat_weight

    def tokens(
        self, bases: np.ndarray, mirrored: np.ndarray, samples: np.ndarray, repeats: bool = False
    ) -> tuple[SampleArrays, np.ndarray]:
        """Tokens of stored bases (B, end - first) uint8, and the number (B,) of bytes that are not IUPAC codes.

        Rows with `mirrored` (B,) bool are read as their reverse complement. `samples` (B,) SAMPLE_DTYPE. With
        `repeats`, the arrays tell which bases are soft-masked.
        """
        if self._shift:
            input_ids, labels, invalid = shift_bases(bases, mirrored, self._length, self._tokens)
        else:
            keys = samples["mask_key"].copy()  # a copy out of the packed record, as the kernel needs it
            masking = self._masking
            if self._mask_rate is not None:
                rates = np.rint(self._mask_rate(samples["g"]) * 2**32)
                masking = masking._replace(labelled=rates.astype(np.uint64))
            input_ids, labels, invalid = mask_bases(bases, mirrored, keys, self.first, masking, self._tokens)
        weights = None
        if self._repeat_weight != 1:
            weights = weigh_repeats(bases, mirrored, self._length, self._shift, self._repeat_weight)
        arrays = SampleArrays(input_ids, labels, weights, samples["g"].copy())
        if repeats:
            arrays.repeats = weigh_repeats(bases, mirrored, self._length, self._shift, 0.0) == 0
        return arrays, invalid

    def separate(self, arrays: SampleArrays, starts: np.ndarray) -> None:
        """Set `starts` (B, L) bool, where packed sequences begin, and remove labels that lie in another sequence than
        their input.
        """
        arrays.starts = starts
        if self._shift:
            arrays.labels[:, :-1][starts[:, 1:]] = IGNORE_LABEL

    def weigh(self, arrays: SampleArrays, weights: np.ndarray) -> None:
        """Multiply the loss weights by `weights` (B, seq_len) float32, those of all bases of the samples."""
        of_labels = np.ones(arrays.labels.shape, np.float32)
        there = weights[:, self.first + self._shift : self.end]
        of_labels[:, : there.shape[1]] = there[:, : of_labels.shape[1]]
        arrays.loss_weights = of_labels if arrays.loss_weights is None else arrays.loss_weights * of_labels
