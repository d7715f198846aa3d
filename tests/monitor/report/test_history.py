"""Rows of metrics.jsonl as columns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caduceus.monitor.report.history import binned, read_history


def write(path: Path, rows: list[Any], end: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def training(step: int, loss: float | None = 1.0, samples: int | None = None) -> dict[str, Any]:
    return {"step": step, "loss": loss, "tokens": 100 * step, "samples": samples or 8 * step, "seconds": 1.0}


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 9)), min_size=1, max_size=40))
def test_a_step_made_again_counts_once_by_its_last_row(tmp_path_factory: Any, made: list[tuple[int, float]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    rows = [row for step, loss in made for row in (training(step, loss), {"step": step, "valid_loss": loss})]
    history = read_history(write(path, rows))
    expected: dict[int, float] = {}
    for step, loss in made:
        expected = {before: value for before, value in expected.items() if before < step} | {step: loss}
    assert dict(zip(history.train["step"], history.train["loss"], strict=True)) == expected
    assert dict(zip(history.valid_steps, history.valid["valid_loss"], strict=True)) == expected


def test_what_is_no_row_is_left_out_and_counted(tmp_path: Path) -> None:
    odd = [7, {"loss": 1.0}, {"step": "2", "loss": 1.0}, {"step": True, "loss": 1.0}, {"step": 2, "other": 1}]
    path = write(
        tmp_path / "metrics.jsonl", [training(1), *odd, training(2, None)], "not JSON\n\n" + '{"step": 3, "los'
    )
    history = read_history(path)
    assert history.train["step"].tolist() == [1, 2] and history.unreadable == len(odd) + 1
    assert np.isnan(history.train["loss"]).tolist() == [False, True] and np.isnan(history.train["lr"]).all()


def test_evaluations_are_columns_over_steps_of_their_own(tmp_path: Path) -> None:
    def evaluated(step: int, name: str, **numbers: float | None) -> dict[str, Any]:
        return {"step": step, "evaluated": name} | {f"eval/{name}/{key}": value for key, value in numbers.items()}

    rows = [training(2), evaluated(2, "a", mcc=0.5, seconds=3.0), evaluated(2, "b", auprc=None)]
    rows += [training(4), evaluated(4, "a", mcc=0.1), training(3), training(4), evaluated(4, "b", auprc=0.7)]
    history = read_history(write(tmp_path / "metrics.jsonl", rows))
    assert history.unreadable == 0 and history.evaluation_steps.tolist() == [2, 4]
    expected = {"a/mcc": [0.5, np.nan], "b/auprc": [np.nan, 0.7]}
    assert history.evaluations.keys() == expected.keys()
    assert all(np.array_equal(history.evaluations[name], expected[name], equal_nan=True) for name in expected)


def test_axes(tmp_path: Path) -> None:
    history = read_history(write(tmp_path / "metrics.jsonl", [training(step) for step in (1, 2, 3, 4)]))
    steps = np.array([0, 2, 4])
    assert history.at(steps, "step").tolist() == [0, 2, 4]
    assert history.at(steps, "tokens") == pytest.approx([0, 2e-7, 4e-7])
    assert history.at(steps, "hours") == pytest.approx([0, 2 / 3600, 4 / 3600])


def test_a_rewind_shows_as_samples_passed_over(tmp_path: Path) -> None:
    rows = [training(step, samples=8 * step + (40 if step > 6 else 0)) for step in range(1, 13)]
    assert read_history(write(tmp_path / "rewound", rows)).jumps() == [(6, 40)]
    larger = [training(step, samples=8 * min(step, 6) + 16 * max(step - 6, 0)) for step in range(1, 13)]
    assert read_history(write(tmp_path / "larger batch", larger)).jumps() == []
    last = [training(step, samples=8 * step + (40 if step > 11 else 0)) for step in range(1, 13)]
    assert read_history(write(tmp_path / "at the end", last)).jumps() == [(11, 40)]


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
