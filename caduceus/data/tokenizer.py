"""Stored bases -> inputs, labels and loss weights, as `data.objective` and its keys ask for. Imports no torch."""

from dataclasses import dataclass

import numpy as np

from caduceus.config import DataConfig
from caduceus.data.masking import Masking, mask_bases, shift_bases, weigh_repeats


@dataclass
class SampleArrays:
    """Tokens of B samples."""

    input_ids: np.ndarray
    """(B, L) uint8."""
    labels: np.ndarray
    """(B, L) uint8, `IGNORE_LABEL` where nothing is predicted."""
    loss_weights: np.ndarray | None
    """(B, L) float32; None where all are 1."""
    g: np.ndarray
    """(B,) int64 sample numbers."""
    substituted: tuple[str, ...] = ()
    """A line for each sample that could not be read and what stands for it."""
    choices: np.ndarray | None = None
    """(B,) int64, the crop taken for each sample: 0 its own, n its n-th substitute; None where there is no choice."""


class Tokenizer:
    """Tokens of samples, or of the slice `positions` (first, end) of each.

    Attributes: `first` and `end` of the positions whose bases it needs. With next_base these are one more than the
    slice has, where the sample goes on, because the last label is the base after it.
    """

    def __init__(self, data: DataConfig, positions: tuple[int, int] | None = None) -> None:
        self.first, end = positions or (0, data.seq_len)
        self._length = end - self.first
        self._shift = int(data.objective == "next_base")
        self.end = min(end + self._shift, data.seq_len)
        self._masking = Masking.of(data.mask_prob, data.mask_token_prob, data.random_token_prob)
        self._repeat_weight = data.repeat_weight

    def tokens(self, bases: np.ndarray, mirrored: np.ndarray, samples: np.ndarray) -> tuple[SampleArrays, np.ndarray]:
        """Tokens of stored bases (B, end - first) uint8, and the count (B,) of bytes that are no IUPAC code.

        Rows with `mirrored` (B,) bool are read as their reverse complement. `samples` (B,) SAMPLE_DTYPE.
        """
        if self._shift:
            input_ids, labels, invalid = shift_bases(bases, mirrored, self._length)
        else:
            keys = samples["mask_key"].copy()  # out of the packed record, as the kernel needs it
            input_ids, labels, invalid = mask_bases(bases, mirrored, keys, self.first, self._masking)
        weights = None
        if self._repeat_weight != 1:
            weights = weigh_repeats(bases, mirrored, self._length, self._shift, self._repeat_weight)
        return SampleArrays(input_ids, labels, weights, samples["g"].copy()), invalid
