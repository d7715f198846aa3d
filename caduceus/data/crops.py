"""The crops of a split: each window cut into training sequences, without those of too few ACGT. Imports no torch."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from caduceus.data.format import MIN_RUN
from caduceus.data.genome import WindowTable
from caduceus.data.packing import Pieces
from caduceus.data.shard_list import JoinedShards
from caduceus.data.tiling import Cut, Tiling
from caduceus.data.windows import WINDOW_DTYPE, MappedWindows, SplitTable
from caduceus.errors import UserError

_ROW_BITS = 32
"""Bits for the number of a packed row; the bits above them number the tiling that it belongs to."""
_TILINGS_KEPT = 3
"""Tilings kept per source, on average: samples that are located together may lie in two epochs."""


class CropTable:
    """All usable crops of several sources, numbered source by source, window by window, from each window's start.

    The tiles of a window begin at multiples of `seq_len`. Tiles with a share of ACGT below `min_acgt`, by the index's
    runs, and those without any, are not crops. The table takes a number per window and per left-out tile, and a row per
    window unless the sources are all the species of a mapped table, in its order. With `pack`, the rests of a shard's
    windows are packed into further crops, numbered after its tiles, for two more numbers per window. `shifted` has the
    crops of a source whose tiles begin at another base.

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
        self._cut = Cut(seq_len, min_acgt, pack)
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

        shards = np.arange(len(self.shards) + 1, dtype=np.uint32)
        self._windows_of_shard = np.searchsorted(self.windows["shard"], shards)
        self._tiling = Tiling(self.windows["length"], self._windows_of_shard, runs, self._cut)
        self._shifted: OrderedDict[tuple[int, int], Tiling] = OrderedDict()
        self.left_out_tiles = self._tiling.left_out
        self.size = self._tiling.size
        self.crops_of_shard = self._tiling.crops_of_shard
        self._first_shard = np.concatenate([[0], np.cumsum(self.shards_of_source)])
        self.crops_of_source = np.diff(self._tiling.first_crop[self._first_shard])
        self.bases_of_source = self._tiling.bases(self._first_window)
        tiled = (self.size + self.left_out_tiles) * seq_len
        self.left_out_bases = 0 if pack else sum(table.bases for table in tables) - tiled

    def shifted(self, source: int, offset: int) -> Tiling:
        """The crops of one source, numbered from 0, with tiles that begin at base `offset` of its windows."""
        if (source, offset) not in self._shifted:
            if len(self._shifted) >= _TILINGS_KEPT * len(self.tables):
                self._shifted.popitem(last=False)
            first, end = self._first_window[source : source + 2]
            shards = self._windows_of_shard[self._first_shard[source] : self._first_shard[source + 1] + 1]
            runs = [(0, self.tables[source].runs)]
            lengths = self.windows["length"][first:end]
            self._shifted[source, offset] = Tiling(lengths, shards - first, runs, self._cut, offset)
        self._shifted.move_to_end((source, offset))
        return self._shifted[source, offset]

    def locate(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Crop numbers (n,) -> row of `windows` (n,), and `begin` (n,): the crop's first base in the window, forward
        strand.

        A packed crop has the window of its first piece, and as `begin` a negative number, which `pieces` understands.
        """
        window, begin, row = self._tiling.locate(crops)
        return window, np.where(row < 0, begin, -1 - row)

    def locate_shifted(self, source: int, offset: int, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`locate` for crops (n,) of a source whose tiling is shifted."""
        window, begin, row = self.shifted(source, offset).locate(crops)
        return window + self._first_window[source], np.where(row < 0, begin, -1 - ((offset + 1 << _ROW_BITS) | row))

    def pieces(self, window: int, begin: int) -> Pieces:
        """The pieces of the crop that `locate` has put at `window` and `begin`."""
        if begin >= 0:
            return Pieces(*(np.array([value]) for value in (window, begin, 0, self.seq_len)))
        offset, row = divmod(-1 - begin, 1 << _ROW_BITS)
        if offset == 0:
            return self._tiling.pieces(row)
        source = int(self.source_of(window))
        pieces = self.shifted(source, offset - 1).pieces(row)
        return pieces._replace(window=pieces.window + self._first_window[source])

    def first_bases(self, window: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """The first base (n,) in its window of each crop that `locate` has put at `window` (n,) and `begin` (n,)."""
        firsts = begin.copy()
        for place in np.flatnonzero(begin < 0).tolist():
            firsts[place] = self.pieces(int(window[place]), int(begin[place])).begin[0]
        return firsts

    def source_of(self, windows: np.ndarray | int) -> np.ndarray:
        """The number of the source of each window."""
        return np.searchsorted(self._first_window, windows, side="right") - 1


def _all_of_a_table(tables: Sequence[WindowTable]) -> SplitTable | None:
    """The mapped table, if `tables` are exactly its species, in its order; else None."""
    contents = [table.content for table in tables]
    if not contents or not all(isinstance(content, MappedWindows) for content in contents):
        return None
    whole = contents[0].whole
    numbers = [content.number for content in contents if content.whole is whole]
    return whole if numbers == list(range(len(whole.species))) and len(numbers) == len(contents) else None
