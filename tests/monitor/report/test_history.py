"""Rows of metrics.jsonl as columns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caduceus.monitor.report.history import read_history


def write(path: Path, rows: list[Any], end: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def training(step: int, loss: float | None = 1.0, samples: int | None = None) -> dict[str, Any]:
    return {"step": step, "loss": loss, "tokens": 100 * step, "samples": samples or 8 * step, "seconds": 1.0}


@pytest.mark.moderate
@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.tuples(st.integers(1, 12), st.floats(0, 9)), min_size=1, max_size=40))
def test_a_step_made_again_counts_once_by_its_last_row(tmp_path_factory: Any, made: list[tuple[int, float]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    rows = [row for step, loss in made for row in (training(step, loss), {"step": step, "valid_loss": loss})]
    history = read_history(write(path, rows))
    expected: dict[int, float] = {}
    for step, loss in made:
        expected = {before: value for before, value in expected.items() if before < step} | {step: loss}
    assert dict(zip(history.train["step"], history.train["loss"], strict=True)) == expected
    assert dict(zip(history.valid.steps, history.valid.columns.get("valid_loss", []), strict=True)) == expected


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
    assert history.unreadable == 0 and history.evaluations.steps.tolist() == [2, 4]
    expected = {"a/mcc": [0.5, np.nan], "b/auprc": [np.nan, 0.7]}
    assert history.evaluations.columns.keys() == expected.keys()
    assert all(np.array_equal(history.evaluations.columns[name], expected[name], equal_nan=True) for name in expected)


def test_axes(tmp_path: Path) -> None:
    history = read_history(write(tmp_path / "metrics.jsonl", [training(step) for step in (1, 2, 3, 4)]))
    steps = np.array([0, 2, 4])
    assert history.at(steps, "step").tolist() == [0, 2, 4]
    assert history.at(steps, "tokens").tolist() == [0, 200, 400]
    assert history.at(steps, "hours") == pytest.approx([0, 2 / 3600, 4 / 3600])


def test_a_rewind_shows_as_samples_passed_over(tmp_path: Path) -> None:
    rows = [training(step, samples=8 * step + (40 if step > 6 else 0)) for step in range(1, 13)]
    assert read_history(write(tmp_path / "rewound", rows)).jumps == [(6, 40)]
    larger = [training(step, samples=8 * min(step, 6) + 16 * max(step - 6, 0)) for step in range(1, 13)]
    assert read_history(write(tmp_path / "larger batch", larger)).jumps == []
    last = [training(step, samples=8 * step + (40 if step > 11 else 0)) for step in range(1, 13)]
    assert read_history(write(tmp_path / "at the end", last)).jumps == [(11, 40)]


def test_a_spike_among_many_rows_is_kept_and_the_last_row_is_the_end(tmp_path: Path) -> None:
    rows = [training(step, loss=9.0 if step == 4321 else 1.0) for step in range(1, 10_000)]
    history = read_history(write(tmp_path / "metrics.jsonl", rows))
    assert history.stride == 32 and history.rows == 9999 and len(history.train["loss"]) == 313
    assert history.most["loss"].max() == 9.0 and history.train["loss"].max() == 1.0 + 8.0 / 32
    assert history.at(np.array([0, 5000, history.steps]), "tokens") == pytest.approx([0, 500_000, 999_900], rel=1e-6)
    assert history.end["hours"] == pytest.approx(9999 / 3600) and history.tail["step"].tolist() == [
        *range(9950, 10_000)
    ]


@pytest.mark.moderate
@pytest.mark.parametrize("cut", [4000, 9000])
def test_steps_made_again_far_back_count_once(tmp_path: Path, cut: int) -> None:
    first, second = (training(step) for step in range(1, 9001)), (training(step, 2.0) for step in range(cut, 9999))
    history = read_history(write(tmp_path / "metrics.jsonl", [*first, *second]))
    once = [training(step, 1.0 if step < cut else 2.0) for step in range(1, 9999)]
    direct = read_history(write(tmp_path / "once.jsonl", once))
    assert history.rows == 9998
    for name, values in direct.train.items():
        assert np.array_equal(history.train[name], values, equal_nan=True), name
    assert history.end["loss"] == direct.end["loss"] and history.jumps == direct.jumps == []


def test_what_machines_do_and_what_tells_of_the_network_stand_apart(tmp_path: Path) -> None:
    telling = {**training(2), "loss/hg38": 1.0, "grad_norm/D": 3.0}
    machines = {"step": 2, "cpu_percent/n1": 50.0, "gpu_percent/n1-gpu0": 99.0}
    history = read_history(write(tmp_path / "metrics.jsonl", [training(1), telling, machines, training(3)]))
    assert history.unreadable == 0 and history.rows == 3
    assert history.vitals.steps.tolist() == [2] and set(history.vitals.columns) == {"grad_norm/D"}
    assert history.machines.steps.tolist() == [2]
    assert {name: values[0] for name, values in history.machines.columns.items()} == {
        "cpu_percent/n1": 50.0,
        "gpu_percent/n1-gpu0": 99.0,
    }
