"""Reduces columns of millions of rows to a few hundred bins, while they are read."""

import numpy as np

BINS = 512
"""Largest number of bins; where there are more rows, there are more than half as many bins."""


class Bins:
    """The rows of some columns in bins of `stride` neighbours: 1 for up to `BINS` rows, and doubled as often as needed.

    An unknown value is NaN, which means, minima and maxima ignore.
    """

    def __init__(self, columns: int) -> None:
        self.rows = 0
        self.stride = 1
        self._known = np.zeros((BINS, columns), np.int64)
        self._sums = np.zeros((BINS, columns))
        self._least = np.full((BINS, columns), np.inf)
        self._most = np.full((BINS, columns), -np.inf)

    def add(self, block: np.ndarray) -> None:
        """Take in the next rows (n, columns)."""
        if not len(block):
            return
        while (self.rows + len(block) - 1) // self.stride >= BINS:
            self._double()
        place = (self.rows + np.arange(len(block))) // self.stride
        starts = np.flatnonzero(np.r_[True, np.diff(place) > 0])
        bins, known = place[starts], ~np.isnan(block)
        self._known[bins] += np.add.reduceat(known.astype(np.int64), starts)
        self._sums[bins] += np.add.reduceat(np.where(known, block, 0.0), starts)
        least = np.minimum.reduceat(np.where(known, block, np.inf), starts)
        most = np.maximum.reduceat(np.where(known, block, -np.inf), starts)
        self._least[bins] = np.minimum(self._least[bins], least)
        self._most[bins] = np.maximum(self._most[bins], most)
        self.rows += len(block)

    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Means, minima and maxima, (bins, columns) each; NaN where a bin has no known value."""
        used = -(-self.rows // self.stride)
        known = self._known[:used]
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self._sums[:used] / known
        return mean, *(np.where(known, values[:used], np.nan) for values in (self._least, self._most))

    def _double(self) -> None:
        half = BINS // 2
        self.stride *= 2
        for values, put_together, none in (
            (self._known, np.add, 0),
            (self._sums, np.add, 0.0),
            (self._least, np.minimum, np.inf),
            (self._most, np.maximum, -np.inf),
        ):
            values[:half] = put_together(values[0::2], values[1::2])
            values[half:] = none


class Jumps:
    """Where the count of samples jumps: at rewinds, which go on with the samples that follow those passed over.

    There a single step is further from the step before it than its neighbours are.
    """

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []
        """(step, samples): the step that the run went back to, and the number of samples that it passed over."""
        self._last = (0.0, 0.0)
        self._pending, self._begun = np.empty((0, 3)), False

    def add(self, steps: np.ndarray, samples: np.ndarray) -> None:
        """Take in the next steps and their counts of samples, each (n,)."""
        steps, samples = np.r_[self._last[0], steps], np.r_[self._last[1], samples]
        self._last = steps[-1], samples[-1]
        told = np.column_stack([steps[:-1], np.diff(samples), np.diff(steps) == 1])
        self._pending = np.concatenate([self._pending, told])
        if not self._begun and len(self._pending) > 1:  # the first step has only one neighbour
            self._begun = True
            self._pending = np.concatenate([[[-1, self._pending[1, 1], 0]], self._pending])
        self._look()

    def end(self) -> list[tuple[int, int]]:
        """All jumps. Call it after the last rows."""
        if len(self._pending) > 1:
            self._pending = np.concatenate([self._pending, [[-1, self._pending[-2, 1], 0]]])
            self._look()
        return self.found

    def _look(self) -> None:
        before, counts, after = self._pending[:-2, 1], self._pending[1:-1, 1], self._pending[2:, 1]
        middle = self._pending[1:-1]
        for at in np.flatnonzero((middle[:, 2] > 0) & (counts > before) & (counts > after)):
            self.found.append((int(middle[at, 0]), int(counts[at] - min(before[at], after[at]))))
        self._pending = self._pending[-2:]


def binned(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean x, and mean, minimum and maximum of y, in at most `bins` runs of neighbours; NaN where all y of a bin are
    NaN.

    x, y: (points,). If there are not more points than bins, each bin has one point.
    """
    if len(x) <= bins:
        return x, y, y, y
    starts = np.linspace(0, len(x), bins, endpoint=False).astype(np.int64)
    known = ~np.isnan(y)
    counts = np.add.reduceat(known.astype(np.int64), starts)
    sizes = np.diff(np.r_[starts, len(x)])
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(known, y, 0.0), starts) / counts
    least = np.minimum.reduceat(np.where(known, y, np.inf), starts)
    most = np.maximum.reduceat(np.where(known, y, -np.inf), starts)
    empty = counts == 0
    least[empty] = most[empty] = np.nan
    return np.add.reduceat(x, starts) / sizes, mean, least, most


def outlined(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The points of a line; if there are more than 2 · `bins`, the minimum and maximum of each bin, so that no spike is
    lost.
    """
    if len(x) <= 2 * bins:
        return x, y
    middle, _, least, most = binned(np.asarray(x, float), y, bins)
    return np.repeat(middle, 2), np.column_stack([least, most]).ravel()
