"""Rows of short windows and of the tails of others, in closed form. Imports no torch.

The tails of a shard's windows, what is left of each behind its last whole crop, follow each other as one stream, and
every `seq_len` bases of it are a row. A tail that reaches over a row's end goes on in the next one, as a sequence of
its own.
"""

from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """What a row is made of, in its order."""

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

    `first_tile` (W + 1,): how many whole crops come before each window. `lengths` (W,) of windows. `first_windows`
    (H + 1,): the windows of each shard. Attribute: `rows_of_shard` (H,).
    """

    def __init__(self, first_tile: np.ndarray, lengths: np.ndarray, first_windows: np.ndarray, seq_len: int) -> None:
        self._seq_len = seq_len
        self._begin = np.diff(first_tile) * seq_len  # of each window's tail
        self._edges = np.concatenate([[0], np.cumsum(lengths - self._begin)])
        self._shard_edges = self._edges[first_windows]
        self.rows_of_shard = -(-np.diff(self._shard_edges) // seq_len)
        self._first_row = np.concatenate([[0], np.cumsum(self.rows_of_shard)])

    def bases(self, first_windows: np.ndarray) -> np.ndarray:
        """Bases (n,) in rows of each range of windows, `first_windows` (n + 1,)."""
        return np.diff(self._edges[first_windows])

    def pieces(self, row: int) -> Pieces:
        """What row number `row` is made of; positions behind the last piece hold nothing."""
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        start = self._shard_edges[shard] + (row - self._first_row[shard]) * self._seq_len
        end = min(start + self._seq_len, self._shard_edges[shard + 1])
        first = int(np.searchsorted(self._edges, start, side="right")) - 1
        last = int(np.searchsorted(self._edges, end, side="left"))
        window = np.arange(first, last)
        left = np.maximum(self._edges[first:last], start)
        length = np.minimum(self._edges[first + 1 : last + 1], end) - left
        window, left, length = (values[length > 0] for values in (window, left, length))
        return Pieces(window, self._begin[window] + left - self._edges[window], left - start, length)
