"""Columns of rows as bins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caduceus.monitor.report import bins as module
from caduceus.monitor.report.bins import Bins, Jumps, binned, outlined


@pytest.mark.moderate
@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.integers(0, 900), max_size=6), st.integers(0, 2**32 - 1))
def test_bins_are_those_of_all_rows_at_once_however_they_come(blocks: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.where(rng.random((sum(blocks), 2)) < 0.1, np.nan, rng.integers(-100, 100, (sum(blocks), 2)))
    bins = Bins(2)
    for block in np.split(rows, np.cumsum(blocks)[:-1]) if blocks else []:
        bins.add(block)
    assert bins.rows == len(rows) and (bins.stride == 1 or len(rows) > module.BINS * bins.stride // 2)
    mean, least, most = bins.table()
    assert len(mean) == -(-len(rows) // bins.stride) <= module.BINS
    for place in range(len(mean)):
        part = rows[place * bins.stride : (place + 1) * bins.stride]
        for column in range(2):
            known = part[:, column][~np.isnan(part[:, column])]
            told = mean[place, column], least[place, column], most[place, column]
            if len(known):
                assert told == (known.sum() / len(known), known.min(), known.max())  # whole numbers: sums are exact
            else:
                assert np.isnan(told).all()


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.integers(1, 40))
def test_jumps_are_found_wherever_rows_are_cut(counts: list[int], cut: int) -> None:
    steps, samples = np.arange(1.0, len(counts) + 1), np.cumsum(counts).astype(float)
    whole, parts = Jumps(), Jumps()
    whole.add(steps, samples)
    for first in range(0, len(counts), cut):
        parts.add(steps[first : first + cut], samples[first : first + cut])
    sides = [
        (counts[at - 1] if at else counts[1], counts[at + 1] if at + 1 < len(counts) else counts[at - 1])
        for at in range(len(counts) if len(counts) > 1 else 0)
    ]
    expected = [(at, counts[at] - min(near)) for at, near in enumerate(sides) if counts[at] > max(near)]
    assert whole.end() == parts.end() == expected


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 40))
def test_an_outline_keeps_the_least_and_greatest(values: list[float], bins: int) -> None:
    y = np.array(values)
    x, drawn = outlined(np.arange(len(y)), y, bins)
    assert len(x) == len(drawn) <= 2 * bins and (np.diff(x) >= 0).all()
    assert drawn.min() == y.min() and drawn.max() == y.max()


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6)), min_size=1, max_size=300), st.integers(1, 40))
def test_bins_keep_the_least_and_greatest_and_the_mean(values: list[float], bins: int) -> None:
    y = np.array(values)
    x, mean, least, most = binned(np.arange(len(y), dtype=float), y, bins)
    assert len(x) == min(bins, len(y)) and (np.diff(x) > 0).all()
    known = y[~np.isnan(y)]
    assert np.isnan(mean).all() == (len(known) == 0)
    if len(known):
        assert np.nanmin(least) == known.min() and np.nanmax(most) == known.max()
        shown = ~np.isnan(mean)
        slack = 1e-9 * np.abs(known).max() + 1e-300  # rounding of a sum of at most 300 values
        assert (least[shown] - slack <= mean[shown]).all() and (mean[shown] <= most[shown] + slack).all()
