"""Interval sets and windows against plain definitions that go base by base."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caduceus.data.format import SPLITS
from data_prep.plan.composition import Composition, Scan, composition, join_scans, runs_where, scan
from data_prep.plan.intervals import EMPTY, complement, covered, difference, intersection, size, union
from data_prep.plan.options import PlanOptions
from data_prep.plan.species import SpeciesRequest, plan_species
from data_prep.plan.windows import cut_windows, extend, tile

LENGTH = 60
interval_lists = st.lists(st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)).map(sorted), max_size=8)


def array(intervals: list) -> np.ndarray:
    return np.array(intervals, dtype=np.int64).reshape(-1, 2)


def bases(intervals: np.ndarray) -> set[int]:
    return {base for start, end in intervals.tolist() for base in range(start, end)}


@pytest.mark.moderate
@given(interval_lists, interval_lists)
def test_interval_sets_are_sets(left_list: list, right_list: list) -> None:
    left, right = union(array(left_list)), union(array(right_list))
    assert bases(left) == bases(array(left_list))
    assert (left[1:, 0] > left[:-1, 1]).all() and (left[:, 0] < left[:, 1]).all(), "disjoint, sorted, not touching"
    assert size(left) == len(bases(left))
    assert bases(intersection(left, right)) == bases(left) & bases(right)
    assert bases(difference(left, right)) == bases(left) - bases(right)
    assert bases(complement(left, LENGTH)) == set(range(LENGTH)) - bases(left)
    starts, ends = array(right_list).T
    assert covered(starts, ends, left).tolist() == [len(bases(left) & set(range(s, e))) for s, e in right_list]


@given(st.text("ACGTacgtNnRy", max_size=300), st.integers(1, 300))
def test_scan_counts_and_finds_runs(text: str, cut: int) -> None:
    letters = np.frombuffer(text.encode(), np.uint8)
    pieces = [scan(letters[i : i + cut], i) for i in range(0, len(letters), cut)]
    whole = join_scans(pieces)
    upper = text.upper()
    counts = composition(letters)
    assert whole.composition == counts
    assert (counts.gc, counts.at) == (upper.count("G") + upper.count("C"), upper.count("A") + upper.count("T"))
    assert (counts.n, counts.lower, counts.bases) == (upper.count("N"), sum(map(str.islower, text)), len(text))
    assert whole.n_runs.tolist() == runs_where(np.array([base == "N" for base in upper], dtype=bool)).tolist()
    assert whole.non_acgt.tolist() == runs_where(np.array([base not in "ACGT" for base in upper], bool)).tolist()


def tile_by_hand(start: int, end: int, options: PlanOptions) -> list[tuple[int, int, int]]:
    """The rule of the format, written as one would say it."""
    windows, position = [], start
    while position + options.window <= end:
        windows.append((position, position + options.window, 0))
        position += options.step
    reached = windows[-1][1] if windows else start
    if reached < end and position < end:
        if options.tail == "short":
            windows.append((position, end, 0))
        elif options.tail == "pad":
            windows.append((position, end, options.window - (end - position)))
        elif options.tail == "inward":
            windows.append((end - options.window, end, 0) if windows else (start, end, 0))
    return [window for window in windows if window[1] - window[0] >= options.min_window]


@given(
    interval_lists,
    st.integers(1, 20),
    st.none() | st.integers(1, 30),
    st.sampled_from(["short", "inward", "drop", "pad"]),
    st.integers(1, 20),
)
def test_tile_follows_the_rule(segments: list, window: int, stride: int | None, tail: str, shortest: int) -> None:
    options = PlanOptions(window=window, stride=stride, tail=tail, min_window=min(shortest, window))
    expected = [row for start, end in bases_as_segments(segments) for row in tile_by_hand(start, end, options)]
    assert sorted(map(tuple, tile(union(array(segments)), options).tolist())) == sorted(expected)


def bases_as_segments(intervals: list) -> list[list[int]]:
    return union(array(intervals)).tolist()


@pytest.mark.moderate
@given(
    text=st.text("ACGTacgtNNNNNR", min_size=1, max_size=LENGTH),
    train=interval_lists,
    valid=interval_lists,
    excluded=interval_lists,
    mode=st.sampled_from(["tile", "exact", "extend"]),
    tail=st.sampled_from(["short", "inward", "drop", "pad"]),
    window=st.integers(1, 20),
    stride=st.none() | st.integers(1, 30),
    shortest=st.integers(1, 8),
    cut_gaps=st.integers(0, 6),
    min_acgt=st.sampled_from([0.0, 0.5, 1.0]),
    forbid=st.none() | st.booleans(),
)
def test_every_base_of_a_contig_is_accounted_for(
    text, train, valid, excluded, mode, tail, window, stride, shortest, cut_gaps, min_acgt, forbid
) -> None:
    options = PlanOptions(
        window=window, stride=stride if mode == "tile" else None, tail=tail, min_window=min(shortest, window),
        cut_gaps=cut_gaps, min_acgt=min_acgt, intervals="a.bed", interval_mode=mode, forbid_leakage=forbid,
    )  # fmt: skip
    length = len(text)
    regions = {
        split: array([row for row in np.minimum(array(rows), length).tolist() if row[0] < row[1]])
        for split, rows in (("train", train), ("valid", valid))
    }
    blacklist = union(np.minimum(array(excluded), length))
    scanned = scan(np.frombuffer(text.encode(), np.uint8), 0)
    found = cut_windows([length], [regions], [blacklist], [scanned], options)
    rows = {split: set() for split in SPLITS}
    for contig, start, end, pad, split in found.windows.tolist():
        assert contig == 0 and 0 <= start < end <= length and options.min_window <= end - start
        assert end - start + pad <= max(window, max((e - s for s, e in regions[SPLITS[split]].tolist()), default=0))
        own = text[start:end].upper()
        assert sum(base in "ACGT" for base in own) >= min_acgt * len(own)
        assert not bases(blacklist) & set(range(start, end))
        rows[SPLITS[split]].add((start, end))
    kept = set().union(*(range(*row) for split in rows.values() for row in split))
    assert found.kept == len(kept)
    assert found.kept + sum(found.dropped.values()) == length
    covered_by = {split: set().union(*(range(*row) for row in rows[split])) for split in SPLITS}
    assert found.leaked["either"] == len(covered_by["train"] & covered_by["valid"])
    if options.leakage_forbidden:
        assert found.leaked["either"] == 0
    if mode == "tile" and stride is None and tail in ("short", "pad", "drop"):
        for split in SPLITS:
            assert sum(end - start for start, end in rows[split]) == len(covered_by[split]), "each base in one window"


@pytest.mark.moderate
@given(
    texts=st.lists(st.text("ACGTNNNNNR", min_size=1, max_size=LENGTH), min_size=1, max_size=4),
    data=st.data(),
    mode=st.sampled_from(["tile", "exact", "extend"]),
    tail=st.sampled_from(["short", "inward", "drop", "pad"]),
    window=st.integers(1, 20),
    stride=st.none() | st.integers(1, 30),
    shortest=st.integers(1, 8),
    cut_gaps=st.integers(0, 6),
)
def test_contigs_together_are_cut_as_each_alone(texts, data, mode, tail, window, stride, shortest, cut_gaps) -> None:
    options = PlanOptions(
        window=window, stride=stride if mode == "tile" else None, tail=tail, min_window=min(shortest, window),
        cut_gaps=cut_gaps, intervals="a.bed", interval_mode=mode,
    )  # fmt: skip
    contigs = []
    for text in texts:
        rows = [array(data.draw(interval_lists)) for _ in range(3)]
        rows = [np.minimum(of_split, len(text)) for of_split in rows]
        train, valid, excluded = (of_split[of_split[:, 0] < of_split[:, 1]] for of_split in rows)
        scanned = scan(np.frombuffer(text.encode(), np.uint8), 0)
        contigs.append((len(text), {"train": train, "valid": valid}, union(excluded), scanned))
    together = cut_windows(*map(list, zip(*contigs, strict=True)), options)
    alone = [cut_windows(*([value] for value in contig), options) for contig in contigs]
    for row, of_contig in enumerate(alone):
        of_contig.windows["contig"] = row
    assert together.windows.tolist() == [window for found in alone for window in found.windows.tolist()]
    assert (together.kept, together.low_acgt_windows) == (
        sum(found.kept for found in alone),
        sum(found.low_acgt_windows for found in alone),
    )
    for counts in ("dropped", "split_bases", "leaked"):
        each = [getattr(found, counts) for found in alone]
        assert getattr(together, counts) == {key: sum(count[key] for count in each) for key in each[0]}


@pytest.mark.moderate
def test_a_draft_genome_is_planned_in_seconds(tmp_path) -> None:
    names = [f"a_contig_name_of_more_than_24_letters_{number}" for number in range(30_000)]
    genome = SimpleNamespace(notes=(), contigs=dict.fromkeys(names, 1500), descriptions={}, path=tmp_path, sha256="")
    scans = dict.fromkeys(names, Scan(Composition(bases=1500, at=1500), EMPTY, EMPTY))
    started = time.process_time()
    plan = plan_species(SpeciesRequest("s", tmp_path, "", PlanOptions()), genome, scans)
    assert time.process_time() - started < 10, "one contig after another takes minutes"
    assert plan.report["splits"]["train"] == {"windows": 30_000, "bases": 45_000_000}
    assert len(set(plan.contig_keys)) == 30_000


def published_interval(start: int, contig_length: int, longest: int = 2**20) -> tuple[int, int]:
    """The interval rule of the published hg38 data set, for crops of the full length, in its own order of steps."""
    end = start + longest
    if end > contig_length:
        start -= end - contig_length
        end = contig_length
    return start, end


def test_extend_is_the_published_rule() -> None:
    rng = np.random.default_rng(1)
    for length in (248_956_422, 57_227_415, 16_777_216, 1_048_576):
        starts = np.sort(rng.integers(0, max(length - 131_072, 1), size=2000))
        rows = np.stack([starts, starts + 131_072], axis=1)
        expected = [published_interval(start, length) for start in starts.tolist()]
        contigs = np.tile([0, length], (len(rows), 1))
        assert list(map(tuple, extend(rows, contigs, 2**20).tolist())) == expected
    assert extend(np.array([[5, 10]]), np.array([[0, 700]]), 2**20).tolist() == [[0, 700]]


HG38_LENGTHS = (
    *(248956422, 242193529, 198295559, 190214555, 181538259, 170805979, 159345973, 156040895),
    *(145138636, 138394717, 135086622, 133797422, 133275309, 114364328, 107043718, 101991189),
    *(90338345, 83257441, 80373285, 64444167, 58617616, 57227415, 50818468, 46709983),
)


def test_extend_mode_on_an_hg38_sized_table_gives_the_published_set() -> None:
    """As many rows of 131,072 bp as the published BED has, over the 24 chromosomes, clustered so that many overlap."""
    rng = np.random.default_rng(2)
    options = PlanOptions(intervals="hg38.bed", interval_mode="extend")
    regions, scans, expected = [], [], set()
    for row, length in enumerate(HG38_LENGTHS):
        number = round(34_021 * length / sum(HG38_LENGTHS))
        starts = np.sort(rng.integers(0, (length - 131_072) // 4096, number) * 4096)
        starts[-1] = length - 131_072
        regions.append({"train": np.stack([starts, starts + 131_072], axis=1)})
        scans.append(Scan(Composition(bases=length, at=length), EMPTY, EMPTY))
        expected |= {(row, *published_interval(start, length)) for start in starts.tolist()}
    windows = cut_windows(HG38_LENGTHS, regions, [EMPTY] * len(HG38_LENGTHS), scans, options).windows
    found = set(zip(windows["contig"].tolist(), windows["start"].tolist(), windows["end"].tolist(), strict=True))
    assert len(expected) > 30_000
    assert found == expected


@pytest.mark.parametrize("mode", ["exact", "extend"])
def test_rows_that_become_the_same_window_stand_once(mode: str) -> None:
    options = PlanOptions(window=50, min_window=1, intervals="a.bed", interval_mode=mode)
    rows = array([[80, 90], [80, 90], [85, 95]])
    found = cut_windows([100], [{"train": rows}], [EMPTY], [scan(np.full(100, ord("A"), np.uint8), 0)], options)
    expected = [(80, 90), (85, 95)] if mode == "exact" else [(50, 100)]
    assert list(zip(found.windows["start"].tolist(), found.windows["end"].tolist(), strict=True)) == expected
