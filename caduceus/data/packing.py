"""Packs short windows, and the rests of longer ones, into rows, in closed form. Imports no torch.

The bases of a shard's windows that no tile holds are joined in order, and every `seq_len` bases of that stream are a
row. A rest that does not fit into a row continues in the next one, as a sequence of its own.
"""

from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """The pieces of a row, in order."""

    window: np.ndarray
    """(n,) rows of the crop table's windows."""
    begin: np.ndarray
    """(n,) first base in the window, on the forward strand."""
    offset: np.ndarray
    """(n,) first position in the row."""
    length: np.ndarray
    """(n,) bases."""


class Packing:
    """The rows of all shards, numbered shard by shard.

    `begin` and `length` (`ends` times W,): the first base and the number of bases of each rest, window after window;
    every window has `ends` rests. `first_windows` (H + 1,): the windows of each shard. Attribute: `rows_of_shard` (H,).
    """

    def __init__(
        self, begin: np.ndarray, length: np.ndarray, first_windows: np.ndarray, seq_len: int, ends: int = 1
    ) -> None:
        self._seq_len = seq_len
        self._begin = begin
        self._ends = ends
        self._edges = np.concatenate([[0], np.cumsum(length)])
        self._shard_edges = self.bases_before(first_windows)
        self.rows_of_shard = -(-np.diff(self._shard_edges) // seq_len)
        self._first_row = np.concatenate([[0], np.cumsum(self.rows_of_shard)])

    def bases_before(self, windows: np.ndarray) -> np.ndarray:
        """Bases (n,) in rows that come from windows before each of `windows` (n,)."""
        return self._edges[windows * self._ends]

    def pieces(self, row: int) -> Pieces:
        """The pieces of row number `row`; positions after the last piece hold nothing."""
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        start = self._shard_edges[shard] + (row - self._first_row[shard]) * self._seq_len
        end = min(start + self._seq_len, self._shard_edges[shard + 1])
        first = int(np.searchsorted(self._edges, start, side="right")) - 1
        last = int(np.searchsorted(self._edges, end, side="left"))
        number = np.arange(first, last)
        left = np.maximum(self._edges[first:last], start)
        length = np.minimum(self._edges[first + 1 : last + 1], end) - left
        number, left, length = (values[length > 0] for values in (number, left, length))
        begin = self._begin[number] + left - self._edges[number]
        return Pieces(number // self._ends, begin, left - start, length)
