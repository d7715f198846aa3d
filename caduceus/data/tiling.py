"""Windows cut into crops at one offset, in closed form: whole tiles, and rows packed from the rests. Imports
no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from caduceus.data.packing import Packing, Pieces


@dataclass(frozen=True)
class Cut:
    """How windows become crops: `seq_len` bases, of which at least the share `min_acgt` is ACGT, by the
    index's runs.
    """

    seq_len: int
    min_acgt: float
    pack: bool = False

    @property
    def least(self) -> int:
        """The smallest number of ACGT in a crop."""
        return max(1, math.ceil(self.min_acgt * self.seq_len - 1e-6))  # the slack keeps 0.55 * 1000 at 550


class Tiling:
    """The crops of W windows in H shards, numbered shard by shard; in each shard tiles come first, then packed rows.

    Tiles follow each other from base `offset` of a window on, as many as at offset 0. Where one does not fit any more,
    it is put at the end of the window that has more bases left, and overlaps its neighbour. With packing, the rests at
    both ends go into rows instead, and a window of one tile is not shifted so far that it would lose the tile. Tiles
    with too few ACGT, and those without any, are not crops.

    `lengths` (W,); `first_windows` (H + 1,): the windows of each shard; `runs`: for each part of the windows, the
    number of its first window, and its runs of non-ACGT. Attributes: `crops_of_shard` (H,), `first_crop` (H + 1,),
    `size`, `left_out` (tiles).
    """

    def __init__(
        self,
        lengths: np.ndarray,
        first_windows: np.ndarray,
        runs: Sequence[tuple[int, np.ndarray]],
        cut: Cut,
        offset: int = 0,
    ) -> None:
        self._seq_len = cut.seq_len
        self._lengths = lengths
        self._first_windows = first_windows
        self._shift, counts = _shifts(lengths, cut, offset) if offset else (None, None)
        self._first_tile = _first_tiles(lengths, cut.seq_len, counts)
        self._excluded = self._tiles_with_fewer_acgt_than(cut.least, runs)
        self.left_out = len(self._excluded)
        self._usable_before_excluded = self._excluded - np.arange(self.left_out)
        self._tile_before = self._usable(self._first_tile[first_windows].astype(np.int64))
        self._tiles_of_shard = np.diff(self._tile_before)
        self._packing = self._packed() if cut.pack else None
        rows_of_shard = self._packing.rows_of_shard if self._packing else np.zeros_like(self._tiles_of_shard)
        self._row_before = np.concatenate([[0], np.cumsum(rows_of_shard)])
        self.crops_of_shard = self._tiles_of_shard + rows_of_shard
        self.first_crop = self._tile_before + self._row_before
        self.size = int(self.first_crop[-1])

    def locate(self, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Crop numbers (n,) -> window (n,), first base in it on the forward strand (n,), and number of the row (n,).

        The window of a row is that of its first piece; a tile's row is -1.
        """
        if self._packing is None:
            return *self._locate_tiles(crops), np.full_like(crops, -1)
        shard = np.searchsorted(self.first_crop, crops, side="right") - 1
        within = crops - self.first_crop[shard]
        packed = within >= self._tiles_of_shard[shard]
        window, begin, row = np.empty_like(crops), np.zeros_like(crops), np.full_like(crops, -1)
        window[~packed], begin[~packed] = self._locate_tiles((self._tile_before[shard] + within)[~packed])
        row[packed] = (self._row_before[shard] + within - self._tiles_of_shard[shard])[packed]
        window[packed] = [self._packing.pieces(number).window[0] for number in row[packed].tolist()]
        return window, begin, row

    def pieces(self, row: int) -> Pieces:
        """The pieces of a row."""
        assert self._packing is not None, "only packed windows have rows"
        return self._packing.pieces(row)

    def bases(self, first_windows: np.ndarray) -> np.ndarray:
        """Bases (n,) in crops, for each range of windows `first_windows` (n + 1,); a base in two crops counts once."""
        tiles = np.diff(self._usable(self._first_tile[first_windows].astype(np.int64))) * self._seq_len
        if self._packing is not None:
            return tiles + np.diff(self._packing.bases_before(first_windows))
        if self._shift is None:
            return tiles
        return tiles - np.diff(np.concatenate([[0], np.cumsum(self._held_twice())])[first_windows])

    def _usable(self, tiles: np.ndarray) -> np.ndarray:
        """How many of the tiles before each of `tiles` (n,) are crops."""
        return tiles - np.searchsorted(self._excluded, tiles)

    def _begin(self, window: np.ndarray, tile: np.ndarray) -> np.ndarray:
        """The first base of tile number `tile` (n,) of each window (n,)."""
        if self._shift is None:
            return tile * self._seq_len
        last = self._lengths[window].astype(np.int64) - self._seq_len
        return np.clip(self._shift[window] + tile * self._seq_len, 0, last)

    def _locate_tiles(self, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tile = usable + np.searchsorted(self._usable_before_excluded, usable, side="right")
        # With another dtype than the table's, numpy would convert the whole table at each call.
        window = np.searchsorted(self._first_tile, tile.astype(self._first_tile.dtype), side="right") - 1
        return window, self._begin(window, tile - self._first_tile[window])

    def _held_twice(self) -> np.ndarray:
        """Bases (W,) of each window that lie in two of its crops."""
        counts = np.diff(self._first_tile).astype(np.int64)
        slack = self._lengths.astype(np.int64) - counts * self._seq_len
        twice = np.where(counts > 1, np.maximum(np.maximum(-self._shift, self._shift - slack), 0), 0)
        first = self._first_tile[:-1] + np.where(self._shift < 0, 0, counts - 2)
        either = np.isin(first, self._excluded) | np.isin(first + 1, self._excluded)
        return np.where(either, 0, twice)

    def _packed(self) -> Packing:
        """Rows of the rest of each window after its last tile, and, where tiles are shifted, before its first."""
        whole = np.diff(self._first_tile).astype(np.int64) * self._seq_len
        if self._shift is None:
            return Packing(whole, self._lengths - whole, self._first_windows, self._seq_len)
        end = self._shift + whole
        begin = np.stack([np.zeros_like(end), end], axis=1).reshape(-1)
        length = np.stack([self._shift, self._lengths - end], axis=1).reshape(-1)
        return Packing(begin, length, self._first_windows, self._seq_len, ends=2)

    def _tiles_with_fewer_acgt_than(self, least: int, runs: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
        """Sorted numbers of the tiles that hold fewer than `least` ACGT, by `runs` and where their windows begin."""
        found = [np.zeros(0, np.int64)]
        margin = 0 if self._shift is None else 1  # a tile at a window's end lies up to one tile from its place
        for first_window, of_part in runs:
            window = of_part["window"].astype(np.int64) + first_window
            start = of_part["start"].astype(np.int64)
            end = start + of_part["length"]
            shift = 0 if self._shift is None else self._shift[window]
            first = np.maximum((start - shift) // self._seq_len - margin, 0)
            last = (end - 1 - shift) // self._seq_len + margin
            last = np.minimum(last, (self._first_tile[window + 1] - self._first_tile[window]).astype(np.int64) - 1)
            touched = np.maximum(last - first + 1, 0)
            run = np.repeat(np.arange(len(start)), touched)
            tile = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(touched) - touched, touched)
            begin = self._begin(window[run], tile)
            overlap = np.minimum(end[run], begin + self._seq_len) - np.maximum(start[run], begin)
            numbers, inverse = np.unique(self._first_tile[window[run]] + tile, return_inverse=True)
            other = np.bincount(inverse, weights=np.maximum(overlap, 0), minlength=len(numbers))
            found.append(numbers[self._seq_len - other < least])
        return np.concatenate(found)


def _first_tiles(lengths: np.ndarray, seq_len: int, counts: np.ndarray | None) -> np.ndarray:
    """How many tiles lie before each window, and in all, (W + 1,); in 32 bits where these hold the last number.

    Every rank has such a number for each window of the split, so their size matters. `counts` (W,): tiles of each
    window; None for all that fit.
    """
    firsts = np.zeros(len(lengths) + 1, np.int64)
    if counts is None:
        np.floor_divide(lengths, seq_len, out=firsts[1:], dtype=np.int64)
    else:
        firsts[1:] = counts
    np.cumsum(firsts, out=firsts)
    return firsts.astype(np.uint32) if firsts[-1] < 1 << 32 else firsts


def _shifts(lengths: np.ndarray, cut: Cut, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """The base (W,) at which the first tile of each window begins, negative where it is cut off, and the number of
    tiles (W,).
    """
    size = cut.seq_len
    counts, slack = np.divmod(lengths.astype(np.int64), size)
    if not cut.pack:
        return np.where(2 * offset <= size + slack, offset, offset - size), counts
    shift = np.where((counts > 1) | ((counts == 1) & (offset <= slack)), offset, 0)
    return shift, counts - (shift > slack)
