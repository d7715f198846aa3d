"""Puts all contigs of a genome on one line, so that a set of bases over any number of contigs is one table."""

from collections.abc import Sequence

import numpy as np


class GenomeLine:
    """Contigs one after another with one position between them, so that intervals of two contigs never touch."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths + 1)[:-1]]).astype(np.int64)[: len(self.lengths)]

    @property
    def contigs(self) -> np.ndarray:
        """Each contig as an interval, (n, 2)."""
        return np.stack([self.starts, self.starts + self.lengths], axis=1)

    def place(self, intervals: Sequence[np.ndarray]) -> np.ndarray:
        """Intervals of each contig in turn, (n, 2) each, as one (m, 2) table on the line."""
        if not len(intervals):
            return np.empty((0, 2), dtype=np.int64)
        counts = [len(of_contig) for of_contig in intervals]
        return np.concatenate(intervals) + np.repeat(self.starts, counts)[:, None]

    def contig_of(self, positions: np.ndarray) -> np.ndarray:
        """The number of the contig that each position lies on, (n,) int64."""
        return np.searchsorted(self.starts, positions, side="right") - 1
