"""The crops of a dataset: each window cut into training sequences, less those of too few bases. Imports no torch."""

import math
from collections.abc import Sequence

import numpy as np

from caduceus.data.format import MIN_RUN
from caduceus.data.genome import WINDOW_DTYPE, WindowTable
from caduceus.errors import UserError


class CropTable:
    """All usable crops of several sources, numbered source by source, window by window, from each window's start.

    Tiles are the whole multiples of `seq_len` in each window; the tiles with fewer than `min_acgt` of ACGT, by the
    index's runs, and those with none at all, are no crops. Memory is a row per window and a number per left-out tile.

    Attributes: `windows` (WINDOW_DTYPE, `shard` numbered over all sources), `window_source` (W,), `shards` (paths),
    `shards_of_source` (S,), `crops_of_shard` (H,), `crops_of_source` (S,), `size`, `left_out_bases` (in the remainders
    of windows), `left_out_tiles`.
    """

    def __init__(self, tables: Sequence[WindowTable], seq_len: int, min_acgt: float) -> None:
        if seq_len < MIN_RUN:
            raise UserError(
                f"data.seq_len: must be at least {MIN_RUN}, the shortest run of N that an index lists; got {seq_len}"
            )
        self.tables = tables
        self.seq_len = seq_len
        self.shards = [path for table in tables for path in table.shards]
        self.shards_of_source = np.array([len(table.shards) for table in tables], np.int64)
        windows_of_source = [len(table.windows) for table in tables]
        self.window_source = np.repeat(np.arange(len(tables)), windows_of_source)
        self.windows = np.concatenate([np.zeros(0, WINDOW_DTYPE), *(table.windows for table in tables)])
        shards_before = np.cumsum(self.shards_of_source) - self.shards_of_source
        self.windows["shard"] += shards_before[self.window_source].astype(np.uint32)

        lengths = self.windows["length"].astype(np.int64)
        tiles = lengths // seq_len
        self.left_out_bases = int((lengths - tiles * seq_len).sum())
        self._tile_first = np.concatenate([[0], np.cumsum(tiles)])
        least = max(1, math.ceil(min_acgt * seq_len - 1e-6))  # the slack keeps 0.55 * 1000 at 550
        excluded = self._tiles_with_fewer_acgt_than(least)
        self.left_out_tiles = len(excluded)
        self._usable_before_excluded = excluded - np.arange(len(excluded))
        self.size = int(self._tile_first[-1]) - len(excluded)

        shard_windows = np.searchsorted(self.windows["shard"], np.arange(len(self.shards) + 1))
        tile_edges = self._tile_first[shard_windows]
        self.crops_of_shard = np.diff(tile_edges - np.searchsorted(excluded, tile_edges))
        shards_through = np.concatenate([[0], np.cumsum(self.shards_of_source)])
        self.crops_of_source = np.diff(np.concatenate([[0], np.cumsum(self.crops_of_shard)])[shards_through])

    def locate(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Crop numbers (n,) -> row of `windows` (n,), and the crop's first base in the window (n,), forward strand."""
        tile = crops + np.searchsorted(self._usable_before_excluded, crops, side="right")
        window = np.searchsorted(self._tile_first, tile, side="right") - 1
        return window, (tile - self._tile_first[window]) * self.seq_len

    def _tiles_with_fewer_acgt_than(self, least: int) -> np.ndarray:
        """Sorted numbers of the tiles that hold fewer than `least` ACGT."""
        windows_before = np.cumsum([0] + [len(table.windows) for table in self.tables])
        found = [np.zeros(0, np.int64)]
        for table, first_window in zip(self.tables, windows_before, strict=False):
            window = table.runs["window"].astype(np.int64) + first_window
            start = table.runs["start"].astype(np.int64)
            end = start + table.runs["length"]
            first_tile = start // self.seq_len
            touched = (end - 1) // self.seq_len - first_tile + 1
            run = np.repeat(np.arange(len(start)), touched)
            tile = first_tile[run] + np.arange(len(run)) - np.repeat(np.cumsum(touched) - touched, touched)
            overlap = np.minimum(end[run], (tile + 1) * self.seq_len) - np.maximum(start[run], tile * self.seq_len)
            number = self._tile_first[window[run]] + tile
            whole = number < self._tile_first[window[run] + 1]
            numbers, inverse = np.unique(number[whole], return_inverse=True)
            other = np.bincount(inverse, weights=overlap[whole], minlength=len(numbers))
            found.append(numbers[self.seq_len - other < least])
        return np.concatenate(found)
