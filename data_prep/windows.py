"""Regions of a contig -> windows: which stretches become samples, and why the rest does not."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from caduceus.data.shards import SPLITS
from data_prep.composition import Scan
from data_prep.intervals import EMPTY, complement, covered, difference, intersection, size, union
from data_prep.options import PlanOptions

WINDOW_DTYPE = np.dtype(
    [
        ("contig", "<u4"),  # row of the species' contig table
        ("start", "<u8"),
        ("end", "<u8"),
        ("pad", "<u4"),  # N appended after `end`
        ("split", "u1"),  # row of SPLITS
    ]
)
DROPPED = ("excluded", "gap", "outside_intervals", "leakage", "low_acgt", "between_windows", "tail", "short")
"""Why bases of a used contig are in no window, in the order in which the reasons are tried."""


@dataclass(frozen=True)
class ContigWindows:
    """The windows of one contig (WINDOW_DTYPE, sorted), and where its bases went.

    `kept` and each of `dropped` (keys DROPPED) count bases once; together they are the contig. `low_acgt_windows`
    counts the windows that `--min-acgt` left out. `leaked`: bases of train windows that lie in valid or test windows,
    by split and in `either`.
    """

    windows: np.ndarray
    kept: int
    dropped: dict[str, int]
    low_acgt_windows: int
    leaked: dict[str, int]


@dataclass(frozen=True)
class _Candidates:
    """Windows before their ACGT is known: split -> (n, 3) start, end, pad; and what was cut away on the way."""

    windows: dict[str, np.ndarray]
    asked_for: np.ndarray  # the set of bases that some split asks for
    gaps: np.ndarray
    leakage: np.ndarray
    segment_ends: np.ndarray


def contig_windows(
    row: int,
    length: int,
    regions: Mapping[str, np.ndarray],
    excluded: np.ndarray,
    scan: Scan,
    options: PlanOptions,
) -> ContigWindows:
    """Windows of contig number `row`. `regions` are each split's intervals, (n, 2), `excluded` a set of bases."""
    if length < options.min_window:  # nothing to weigh; a draft assembly has many of these
        return _too_short(length)
    if options.interval_mode == "tile":
        candidates = _tile_regions(regions, excluded, scan, options)
    else:
        candidates = _windows_of_rows(length, regions, excluded, options)
    windows = np.sort(_table(row, candidates.windows), order=("start", "end", "split"))
    rich = enough_acgt(windows, scan, options.min_acgt)
    kept = footprint(windows[rich])
    rest = complement(kept, length)
    dropped = dict.fromkeys(DROPPED, 0)
    for reason, bases in (
        ("excluded", excluded),
        ("gap", candidates.gaps),
        ("outside_intervals", complement(candidates.asked_for, length)),
        ("leakage", candidates.leakage),
        ("low_acgt", footprint(windows[~rich])),
    ):
        dropped[reason] = size(intersection(rest, bases))
        rest = difference(rest, bases)
    at_end = np.isin(rest[:, 1], candidates.segment_ends) | (options.step <= options.window)
    dropped["between_windows"] = size(rest[~at_end])
    dropped["tail" if options.tail == "drop" else "short"] = size(rest[at_end])
    return ContigWindows(windows[rich], size(kept), dropped, int((~rich).sum()), leaked_bases(windows[rich]))


def _too_short(length: int) -> ContigWindows:
    dropped = dict.fromkeys(DROPPED, 0) | {"short": length}
    return ContigWindows(np.empty(0, dtype=WINDOW_DTYPE), 0, dropped, 0, {"valid": 0, "test": 0, "either": 0})


def tile(segments: np.ndarray, options: PlanOptions) -> np.ndarray:
    """Cut each segment (n, 2) into windows of `--window` at `--stride`, its end by `--tail`: (m, 3) start, end, pad.

    A segment shorter than the window gives one window of its own length (padded with `pad`, none with `drop`).
    Windows below `--min-window` are left out.
    """
    start, end = segments[:, 0], segments[:, 1]
    full = np.maximum((end - start - options.window) // options.step + 1, 0)
    rows = np.repeat(np.arange(len(full)), full)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(full) - full, full)
    full_start = start[rows] + number * options.step
    windows = np.stack([full_start, full_start + options.window, np.zeros_like(full_start)], axis=1)
    if options.tail != "drop":
        windows = np.concatenate([windows, _tails(start, end, full, options)])
    return windows[windows[:, 1] - windows[:, 0] >= options.min_window]


def extend(rows: np.ndarray, length: int, window: int) -> np.ndarray:
    """Move each row's end to start + window, and the whole inward where that is beyond the contig, (n, 2).

    The rule of the published training sets (Avsec et al. 2021; Nguyen et al. 2023, arXiv:2306.15794), with 2^20 as
    window. A contig shorter than the window gives all of itself.
    """
    start = np.maximum(np.minimum(rows[:, 0], length - window), 0)
    return np.stack([start, np.minimum(start + window, length)], axis=1)


def enough_acgt(windows: np.ndarray, scan: Scan, min_acgt: float) -> np.ndarray:
    """Which windows have at least this share of ACGT among their own bases (padding aside), (n,) bool."""
    start, end = windows["start"].astype(np.int64), windows["end"].astype(np.int64)
    return (end - start) - covered(start, end, scan.non_acgt) >= min_acgt * (end - start)


def footprint(windows: np.ndarray) -> np.ndarray:
    """The set of bases that lie in at least one of the windows (WINDOW_DTYPE), which are of one contig."""
    return union(np.stack([windows["start"], windows["end"]], axis=1).astype(np.int64))


def leaked_bases(windows: np.ndarray) -> dict[str, int]:
    """Bases of one contig's train windows that also lie in its valid windows, test windows, or either."""
    train, valid, test = (footprint(windows[windows["split"] == number]) for number in range(len(SPLITS)))
    either = union(np.concatenate([valid, test]))
    held_out = {"valid": valid, "test": test, "either": either}
    return {name: size(intersection(train, bases)) for name, bases in held_out.items()}


def _tile_regions(
    regions: Mapping[str, np.ndarray], excluded: np.ndarray, scan: Scan, options: PlanOptions
) -> _Candidates:
    gaps = EMPTY if options.cut_gaps == 0 else scan.n_runs[np.diff(scan.n_runs)[:, 0] >= options.cut_gaps]
    asked = {split: union(rows) for split, rows in regions.items()}
    segments = {split: difference(difference(rows, excluded), gaps) for split, rows in asked.items()}
    leakage = EMPTY
    if options.leakage_forbidden and "train" in segments:
        leakage = union(np.concatenate([EMPTY, *(asked[split] for split in asked if split != "train")]))
        segments["train"] = difference(segments["train"], leakage)
    return _Candidates(
        windows={split: tile(pieces, options) for split, pieces in segments.items()},
        asked_for=union(np.concatenate([EMPTY, *asked.values()])),
        gaps=gaps,
        leakage=intersection(leakage, asked.get("train", EMPTY)),
        segment_ends=np.concatenate([pieces[:, 1] for pieces in segments.values()]),
    )


def _windows_of_rows(
    length: int, regions: Mapping[str, np.ndarray], excluded: np.ndarray, options: PlanOptions
) -> _Candidates:
    """Each row, as it is or extended, is a window; what is excluded or leaks is cut out of it."""
    rows = {
        split: np.unique(extend(rows, length, options.window) if options.interval_mode == "extend" else rows, axis=0)
        for split, rows in regions.items()
    }
    leakage = EMPTY
    if options.leakage_forbidden and "train" in rows:
        leakage = union(np.concatenate([EMPTY, *(rows[split] for split in rows if split != "train")]))
    windows = {}
    for split, of_split in rows.items():
        removed = union(np.concatenate([excluded, leakage])) if split == "train" else excluded
        pieces = np.unique(intersection(of_split, complement(removed, length)), axis=0)
        pieces = pieces[pieces[:, 1] - pieces[:, 0] >= options.min_window]
        windows[split] = np.concatenate([pieces, np.zeros((len(pieces), 1), dtype=np.int64)], axis=1)
    asked_for = union(np.concatenate([EMPTY, *rows.values()]))
    return _Candidates(windows, asked_for, gaps=EMPTY, leakage=leakage, segment_ends=asked_for[:, 1])


def _table(row: int, windows: Mapping[str, np.ndarray]) -> np.ndarray:
    tables = [np.empty(0, dtype=WINDOW_DTYPE)]
    for split, of_split in windows.items():
        table = np.zeros(len(of_split), dtype=WINDOW_DTYPE)
        table["contig"], table["split"] = row, SPLITS.index(split)
        table["start"], table["end"], table["pad"] = of_split.T
        tables.append(table)
    return np.concatenate(tables)


def _tails(start: np.ndarray, end: np.ndarray, full: np.ndarray, options: PlanOptions) -> np.ndarray:
    tail_start = start + full * options.step
    reached = np.where(full > 0, tail_start - options.step + options.window, start)
    left_over = (reached < end) & (tail_start < end)
    start, end, full, tail_start = start[left_over], end[left_over], full[left_over], tail_start[left_over]
    if options.tail == "inward":
        tail_start = np.where(full > 0, end - options.window, start)
    pad = options.window - (end - tail_start) if options.tail == "pad" else np.zeros_like(end)
    return np.stack([tail_start, end, pad], axis=1)


def hash_rows(seed: int, purpose: int, *columns: np.ndarray) -> np.ndarray:
    """A well-mixed 64-bit number per row of integer columns, (n,) uint64; the same on any machine (splitmix64)."""
    state = _mix(np.full(len(columns[0]), seed, dtype=np.uint64) + np.uint64(purpose))
    for column in columns:
        state = _mix(state ^ column.astype(np.uint64))
    return state


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
