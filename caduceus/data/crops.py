"""The crops of a dataset: each window cut into training sequences, less those of too few bases. Imports no torch."""

import math
from collections.abc import Sequence

import numpy as np

from caduceus.data.format import MIN_RUN
from caduceus.data.genome import WindowTable
from caduceus.data.packing import Packing, Pieces
from caduceus.data.shard_list import JoinedShards
from caduceus.data.windows import WINDOW_DTYPE, MappedWindows, SplitTable
from caduceus.errors import UserError


class CropTable:
    """All usable crops of several sources, numbered source by source, window by window, from each window's start.

    Tiles are the whole multiples of `seq_len` in each window; the tiles with fewer than `min_acgt` of ACGT, by the
    index's runs, and those with none at all, are no crops. Memory is a number per window and per left-out tile, and a
    row per window unless the sources are all of a mapped table, in its order. With `pack`, what the windows of a shard
    have beside their tiles is packed into further crops, after its tiles, for two more numbers per window.

    Attributes: `windows` (WINDOW_DTYPE, `shard` numbered over all sources), `shards`, `shards_of_source` (S,),
    `crops_of_shard` (H,), `crops_of_source` (S,), `bases_of_source` (S,) in crops, `size`, `left_out_bases` (in the
    remainders of windows), `left_out_tiles`.
    """

    def __init__(self, tables: Sequence[WindowTable], seq_len: int, min_acgt: float, pack: bool = False) -> None:
        if seq_len < MIN_RUN:
            raise UserError(
                f"data.seq_len: must be at least {MIN_RUN}, the shortest run of N that an index lists; got {seq_len}"
            )
        self.tables = tables
        self.seq_len = seq_len
        self.shards = JoinedShards([table.shards for table in tables])
        self.shards_of_source = np.array([len(table.shards) for table in tables], np.int64)
        self._first_window = np.cumsum([0] + [len(table.rows) for table in tables])
        whole = _all_of_a_table(tables)
        if whole is not None:
            self.windows, runs = whole.windows, [(0, whole.runs)]
        else:
            self.windows = np.concatenate([np.zeros(0, WINDOW_DTYPE), *(table.windows for table in tables)])
            shards_before = np.cumsum(self.shards_of_source) - self.shards_of_source
            self.windows["shard"] += np.repeat(shards_before, np.diff(self._first_window)).astype(np.uint32)
            runs = [(int(first), table.runs) for first, table in zip(self._first_window, tables, strict=False)]

        lengths = self.windows["length"]
        self._tile_first = np.zeros(len(lengths) + 1, np.int64)
        np.floor_divide(lengths, seq_len, out=self._tile_first[1:], dtype=np.int64)
        np.cumsum(self._tile_first, out=self._tile_first)
        remainders = int(lengths.sum(dtype=np.int64)) - int(self._tile_first[-1]) * seq_len
        self.left_out_bases = 0 if pack else remainders
        least = max(1, math.ceil(min_acgt * seq_len - 1e-6))  # the slack keeps 0.55 * 1000 at 550
        excluded = self._tiles_with_fewer_acgt_than(least, runs)
        self.left_out_tiles = len(excluded)
        self._usable_before_excluded = excluded - np.arange(len(excluded))
        shard_windows = np.searchsorted(self.windows["shard"], np.arange(len(self.shards) + 1, dtype=np.uint32))
        tile_edges = self._tile_first[shard_windows]
        self._tiles_of_shard = np.diff(tile_edges - np.searchsorted(excluded, tile_edges))
        self._packing = Packing(self._tile_first, lengths, shard_windows, seq_len) if pack else None
        rows_of_shard = self._packing.rows_of_shard if self._packing else np.zeros_like(self._tiles_of_shard)
        self.crops_of_shard = self._tiles_of_shard + rows_of_shard
        self._crop_first, self._tile_before, self._row_before = (
            np.concatenate([[0], np.cumsum(counts)])
            for counts in (self.crops_of_shard, self._tiles_of_shard, rows_of_shard)
        )
        self.size = int(self._crop_first[-1])
        shards_through = np.concatenate([[0], np.cumsum(self.shards_of_source)])
        self.crops_of_source = np.diff(self._crop_first[shards_through])
        packed = self._packing.bases(self._first_window) if self._packing else 0
        self.bases_of_source = np.diff(self._tile_before[shards_through]) * seq_len + packed

    def locate(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Crop numbers (n,) -> row of `windows` (n,), and the crop's first base in the window (n,), forward strand.

        A packed crop has the window of its first piece, and in the place of a base -1 less its number, which `pieces`
        takes.
        """
        if self._packing is None:
            return self._locate_tiles(crops)
        shard = np.searchsorted(self._crop_first, crops, side="right") - 1
        within = crops - self._crop_first[shard]
        packed = within >= self._tiles_of_shard[shard]
        window, begin = np.empty_like(crops), np.empty_like(crops)
        window[~packed], begin[~packed] = self._locate_tiles((self._tile_before[shard] + within)[~packed])
        rows = (self._row_before[shard] + within - self._tiles_of_shard[shard])[packed]
        window[packed], begin[packed] = [self._packing.pieces(row).window[0] for row in rows.tolist()], -1 - rows
        return window, begin

    def pieces(self, window: int, begin: int) -> Pieces:
        """What a crop is made of, by what `locate` says of it."""
        if begin < 0 and self._packing is not None:
            return self._packing.pieces(-1 - begin)
        return Pieces(*(np.array([value]) for value in (window, begin, 0, self.seq_len)))

    def first_bases(self, window: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """The first base (n,) in its window of each crop, by what `locate` says of them."""
        firsts = begin.copy()
        for place in np.flatnonzero(begin < 0).tolist():
            firsts[place] = self.pieces(int(window[place]), int(begin[place])).begin[0]
        return firsts

    def _locate_tiles(self, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of tiles that are crops, by their number among those (n,)."""
        tile = usable + np.searchsorted(self._usable_before_excluded, usable, side="right")
        window = np.searchsorted(self._tile_first, tile, side="right") - 1
        return window, (tile - self._tile_first[window]) * self.seq_len

    def source_of(self, windows: np.ndarray | int) -> np.ndarray:
        """The number of the source of each window."""
        return np.searchsorted(self._first_window, windows, side="right") - 1

    def _tiles_with_fewer_acgt_than(self, least: int, runs: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
        """Sorted numbers of the tiles that hold fewer than `least` ACGT, by `runs` and where their windows begin."""
        found = [np.zeros(0, np.int64)]
        for first_window, of_part in runs:
            window = of_part["window"].astype(np.int64) + first_window
            start = of_part["start"].astype(np.int64)
            end = start + of_part["length"]
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


def _all_of_a_table(tables: Sequence[WindowTable]) -> SplitTable | None:
    """The mapped table of which these are all species, in its order; else None."""
    contents = [table.content for table in tables]
    if not contents or not all(isinstance(content, MappedWindows) for content in contents):
        return None
    whole = contents[0].whole
    numbers = [content.number for content in contents if content.whole is whole]
    return whole if numbers == list(range(len(whole.species))) and len(numbers) == len(contents) else None
