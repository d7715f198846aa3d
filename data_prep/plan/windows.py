"""Cuts regions of the contigs into windows: which stretches become samples, and why the rest does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from caduceus.data.format import SPLITS
from data_prep.plan.composition import Scan
from data_prep.plan.intervals import EMPTY, covered, difference, intersection, size, union
from data_prep.plan.line import GenomeLine
from data_prep.plan.options import PlanOptions

PLANNED_DTYPE = np.dtype(
    [
        ("contig", "<u4"),  # row of the species' contig table
        ("start", "<u8"),
        ("end", "<u8"),
        ("pad", "<u4"),  # N appended after `end`
        ("split", "u1"),  # row of SPLITS
    ]
)
DROPPED = ("excluded", "gap", "outside_intervals", "leakage", "low_acgt", "between_windows", "tail", "short")
"""Reasons why bases of a used contig are not in a window; the first that holds counts."""


@dataclass(frozen=True)
class GenomeWindows:
    """The windows of the used contigs (PLANNED_DTYPE, sorted), and what became of all bases of these contigs.

    `kept` and each of `dropped` (keys DROPPED) count every base once; they add up to the contigs. `split_bases` counts
    each base of a split once. `low_acgt_windows` counts the windows that `--min-acgt` left out. `leaked`: bases of
    train windows that also lie in valid or test windows, by split and in `either`.
    """

    windows: np.ndarray
    kept: int
    dropped: dict[str, int]
    split_bases: dict[str, int]
    low_acgt_windows: int
    leaked: dict[str, int]


@dataclass(frozen=True)
class _Candidates:
    """Windows before their ACGT is known, split -> (n, 3) start, end, pad; and the bases that were cut away
    until then.
    """

    windows: dict[str, np.ndarray]
    asked_for: np.ndarray  # the set of bases that at least one split asks for
    gaps: np.ndarray
    leakage: np.ndarray
    segment_ends: np.ndarray


def cut_windows(
    lengths: Sequence[int],
    regions: Sequence[Mapping[str, np.ndarray]],
    excluded: Sequence[np.ndarray],
    scans: Sequence[Scan],
    options: PlanOptions,
) -> GenomeWindows:
    """Cut the windows of contigs; for each contig: its length, its splits' intervals (n, 2), its excluded set and its
    scan.

    All contigs are cut at once: a draft assembly has too many of them for a loop.
    """
    usable = [row for row, length in enumerate(lengths) if length >= options.min_window]
    line = GenomeLine([lengths[row] for row in usable])
    present = [split for split in SPLITS if any(split in of_contig for of_contig in regions)]
    rows = {split: line.place([regions[row].get(split, EMPTY) for row in usable]) for split in present}
    removed = line.place([excluded[row] for row in usable])
    if options.interval_mode == "tile":
        n_runs = line.place([scans[row].n_runs for row in usable])
        candidates = _tile_regions(rows, removed, n_runs, options)
    else:
        candidates = _windows_of_rows(line, rows, removed, options)
    windows = _table(candidates.windows)
    rich = enough_acgt(windows, line.place([scans[row].non_acgt for row in usable]), options.min_acgt)
    kept = bases_in(windows[rich])
    rest = difference(line.contigs, kept)
    dropped = dict.fromkeys(DROPPED, 0)
    for reason, bases in (
        ("excluded", removed),
        ("gap", candidates.gaps),
        ("outside_intervals", difference(line.contigs, candidates.asked_for)),
        ("leakage", candidates.leakage),
        ("low_acgt", bases_in(windows[~rich])),
    ):
        dropped[reason] = size(intersection(rest, bases))
        rest = difference(rest, bases)
    at_end = np.isin(rest[:, 1], candidates.segment_ends) | (options.step <= options.window)
    dropped["between_windows"] = size(rest[~at_end])
    dropped["tail" if options.tail == "drop" else "short"] = size(rest[at_end])
    dropped["short"] += sum(lengths) - int(line.lengths.sum())
    bases_of = {split: bases_in(windows[rich & (windows["split"] == n)]) for n, split in enumerate(SPLITS)}
    return GenomeWindows(
        windows=_on_contigs(windows[rich], line, np.array(usable, dtype=np.int64)),
        kept=size(kept),
        dropped=dropped,
        split_bases={split: size(bases) for split, bases in bases_of.items()},
        low_acgt_windows=int((~rich).sum()),
        leaked=leaked_bases(bases_of),
    )


def tile(segments: np.ndarray, options: PlanOptions) -> np.ndarray:
    """Cut each segment (n, 2) into windows of `--window` at `--stride`, and its end by `--tail`: (m, 3) start, end,
    pad.

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


def extend(rows: np.ndarray, contigs: np.ndarray, window: int) -> np.ndarray:
    """Move each row's end to start + window, and the whole row inward where that is beyond its contig, (n, 2).

    This is the rule of the published training sets (Avsec et al. 2021; Nguyen et al. 2023, arXiv:2306.15794), with a
    window of 2^20. A contig shorter than the window becomes one window.
    """
    start = np.maximum(np.minimum(rows[:, 0], contigs[:, 1] - window), contigs[:, 0])
    return np.stack([start, np.minimum(start + window, contigs[:, 1])], axis=1)


def enough_acgt(windows: np.ndarray, non_acgt: np.ndarray, min_acgt: float) -> np.ndarray:
    """(n,) bool: which windows have at least the share `min_acgt` of ACGT among their bases, without padding."""
    start, end = windows["start"].astype(np.int64), windows["end"].astype(np.int64)
    return (end - start) - covered(start, end, non_acgt) >= min_acgt * (end - start)


def bases_in(windows: np.ndarray) -> np.ndarray:
    """The set of bases that lie in at least one of the windows (PLANNED_DTYPE), which are on the line of contigs."""
    return union(np.stack([windows["start"], windows["end"]], axis=1).astype(np.int64))


def leaked_bases(bases_of: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many bases of train also lie in valid, in test, and in either; `bases_of`: each split's set."""
    valid, test = bases_of["valid"], bases_of["test"]
    held_out = {"valid": valid, "test": test, "either": union(np.concatenate([valid, test]))}
    return {name: size(intersection(bases_of["train"], bases)) for name, bases in held_out.items()}


def _tile_regions(
    regions: Mapping[str, np.ndarray], excluded: np.ndarray, n_runs: np.ndarray, options: PlanOptions
) -> _Candidates:
    gaps = EMPTY if options.cut_gaps == 0 else n_runs[np.diff(n_runs)[:, 0] >= options.cut_gaps]
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
        segment_ends=np.concatenate([EMPTY[:, 1], *(pieces[:, 1] for pieces in segments.values())]),
    )


def _windows_of_rows(
    line: GenomeLine, regions: Mapping[str, np.ndarray], excluded: np.ndarray, options: PlanOptions
) -> _Candidates:
    """Make a window of each row, as it is or extended; excluded and leaking bases are cut out of it."""
    rows = dict(regions)
    if options.interval_mode == "extend":
        contigs = line.contigs
        rows = {s: extend(r, contigs[line.contig_of(r[:, 0])], options.window) for s, r in regions.items()}
    leakage = EMPTY
    if options.leakage_forbidden and "train" in rows:
        leakage = union(np.concatenate([EMPTY, *(rows[split] for split in rows if split != "train")]))
    windows = {}
    for split, of_split in rows.items():
        removed = union(np.concatenate([excluded, leakage])) if split == "train" else excluded
        pieces = np.unique(intersection(of_split, difference(line.contigs, removed)), axis=0)
        pieces = pieces[pieces[:, 1] - pieces[:, 0] >= options.min_window]
        windows[split] = np.concatenate([pieces, np.zeros((len(pieces), 1), dtype=np.int64)], axis=1)
    asked_for = union(np.concatenate([EMPTY, *rows.values()]))
    return _Candidates(windows, asked_for, gaps=EMPTY, leakage=leakage, segment_ends=asked_for[:, 1])


def _table(windows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Windows on the line as a sorted table (PLANNED_DTYPE)."""
    tables = [np.empty(0, dtype=PLANNED_DTYPE)]
    for split, of_split in windows.items():
        table = np.zeros(len(of_split), dtype=PLANNED_DTYPE)
        table["split"] = SPLITS.index(split)
        table["start"], table["end"], table["pad"] = of_split.T
        tables.append(table)
    table = np.concatenate(tables)
    return table[np.lexsort([table[key] for key in ("pad", "split", "end", "start")])]


def _on_contigs(windows: np.ndarray, line: GenomeLine, rows: np.ndarray) -> np.ndarray:
    """The windows with rows of the contig table, and with positions on their contigs instead of on the line."""
    number = line.contig_of(windows["start"].astype(np.int64))
    placed = windows.copy()
    placed["contig"] = rows[number]
    placed["start"] -= line.starts[number].astype(np.uint64)
    placed["end"] -= line.starts[number].astype(np.uint64)
    return placed


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
    """A hash of each row of integer columns, (n,) uint64; the same on any machine (splitmix64)."""
    state = mix(np.full(len(columns[0]), seed, dtype=np.uint64) + np.uint64(purpose))
    for column in columns:
        state = mix(state ^ column.astype(np.uint64))
    return state


def mix(state: np.ndarray) -> np.ndarray:
    """Bijective 64-bit hash, (n,) uint64: splitmix64."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
