"""Sets of bases on one contig: sorted, disjoint, half-open intervals as (n, 2) int64 arrays."""

import numpy as np

EMPTY = np.empty((0, 2), dtype=np.int64)


def union(intervals: np.ndarray) -> np.ndarray:
    """The set of any (n, 2) intervals, in any order; intervals that touch become one, and empty ones vanish."""
    intervals = intervals[intervals[:, 0] < intervals[:, 1]]
    if len(intervals) == 0:
        return EMPTY
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(intervals[:, 1])
    first = np.concatenate([[True], intervals[1:, 0] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([intervals[first, 0], reach[last]], axis=1)


def intersection(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The bases that lie in both sets."""
    low = np.searchsorted(right[:, 1], left[:, 0], side="right")
    high = np.searchsorted(right[:, 0], left[:, 1], side="left")
    rows, others = expand_ranges(low, high)
    return np.stack([np.maximum(left[rows, 0], right[others, 0]), np.minimum(left[rows, 1], right[others, 1])], axis=1)


def complement(intervals: np.ndarray, length: int) -> np.ndarray:
    """The bases of [0, length) that do not lie in the set."""
    edges = np.concatenate([[0], intervals.ravel(), [length]]).reshape(-1, 2)
    return edges[edges[:, 0] < edges[:, 1]]


def difference(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The bases of `left` that do not lie in `right`."""
    if len(left) == 0 or len(right) == 0:
        return left
    return intersection(left, complement(right, max(left[-1, 1], right[-1, 1])))


def size(intervals: np.ndarray) -> int:
    """Number of bases in the set."""
    return int((intervals[:, 1] - intervals[:, 0]).sum())


def expand_ranges(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (row, i) with low[row] <= i < high[row], by row and i."""
    counts = np.maximum(high - low, 0)
    rows = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, low[rows] + within


def covered(starts: np.ndarray, ends: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """How many bases of each [start, end) lie in the set, (n,) int64."""
    before = np.concatenate([[0], np.cumsum(intervals[:, 1] - intervals[:, 0])])
    return _covered_below(ends, intervals, before) - _covered_below(starts, intervals, before)


def _covered_below(positions: np.ndarray, intervals: np.ndarray, before: np.ndarray) -> np.ndarray:
    begun = np.searchsorted(intervals[:, 0], positions, side="left")
    if len(intervals) == 0:
        return before[begun]
    overshoot = np.maximum(intervals[begun - 1, 1] - positions, 0)
    return before[begun] - np.where(begun > 0, overshoot, 0)
