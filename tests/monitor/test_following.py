"""Rows read from outside while a trainer adds, drops and makes them again."""

import json
from pathlib import Path
from typing import Any

import pytest

from caduceus.monitor.following import Follower
from caduceus.monitor.view import View
from caduceus.monitor.wandb import journal as journals
from caduceus.monitor.wandb.history import essence, merged
from caduceus.monitor.wandb.journal import Journal, StaleError, send
from caduceus.run.directory import RunDirectory
from caduceus.run.rows import cut_after


def made(first: int, last: int, making: int = 0) -> list[dict[str, Any]]:
    rows = []
    for step in range(first, last + 1):
        loss = 1.0 + step * (1 + making)
        rows.append({"step": step, "samples": step, "loss": loss, "tokens_per_second": 1.0, "seconds": 1.0})
        rows += [{"step": step, "valid_loss": loss}] if step % 10 == 0 else []
    return rows


def add(path: Path, rows: list[dict[str, Any]], torn: str = "") -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + torn)


@pytest.mark.parametrize("made_again", [5, 30])
def test_rows_cut_off_and_made_again_are_told_however_long_the_file_is_by_then(tmp_path: Path, made_again: int) -> None:
    path, follower = tmp_path / "metrics.jsonl", Follower(tmp_path / "metrics.jsonl")
    assert follower.poll() == [] and not follower.restarted
    add(path, made(1, 12), '{"step": 13,')
    assert follower.poll() == made(1, 12) and follower.restarted
    assert follower.poll() == [] and not follower.restarted
    cut_after(path, 7)
    add(path, made(8, 8 + made_again, making=1))
    rows = follower.poll()
    assert follower.restarted and rows == [*made(1, 7), *made(8, 8 + made_again, making=1)]


class Client:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, row: dict[str, Any], step: int) -> None:
        self.steps.append(step)


def catch_up(metrics: Path, journal: Journal) -> tuple[list[int], int]:
    """The steps that are sent, and how many rows were looked at for it."""
    client, follower = Client(), Follower(metrics, lambda: journal.first_unsent(metrics))
    rows = follower.poll()
    for row in merged(rows):
        send(client, journal, row, lambda step: {})
    return client.steps, len(rows)


@pytest.mark.moderate
def test_the_journal_looks_at_new_steps_and_at_those_made_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "_HELD", 50)
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "sent.jsonl"
    add(metrics, made(1, 3000))
    assert catch_up(metrics, Journal(path, 0)) == (list(range(1, 3001)), 3300)
    add(metrics, made(3001, 3005))
    steps, looked = catch_up(metrics, Journal(path, 3000))
    assert steps == [3001, 3002, 3003, 3004, 3005] and looked < 130
    # The run went back to step 2000, and its steps are others now.
    cut_after(metrics, 2000)
    add(metrics, made(2001, 2900, making=1))
    with pytest.raises(StaleError) as stale:
        catch_up(metrics, Journal(path, 3005))
    assert stale.value.args == (2000,)
    journal = Journal(path, 3005)
    journal.drop_after(2000)
    assert catch_up(metrics, journal)[0] == list(range(2001, 2901))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        essence(row) for row in merged(made(1, 2000) + made(2001, 2900, making=1))
    ]
    # W&B has less than the journal: a client was killed before it had sent all.
    assert catch_up(metrics, Journal(path, 2890))[0] == list(range(2891, 2901))


def test_a_view_recalls_from_the_last_rows_what_it_would_show_of_all(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    rows, best = made(1, 500), (10, 11.0)
    whole, recalled = (View(run, "run", 1000, 10) for _ in range(2))
    for row in rows:
        whole.take(row)
        if "valid_loss" in row:
            row |= {"best_step": best[0], "best_valid_loss": best[1]}
    add(run.metrics_path, rows)
    assert recalled.recall() == run.metrics_path.stat().st_size
    for name in ("row", "valid", "best_valid", "loss", "trend", "bases_per_second", "seconds_per_step", "seconds_left"):
        assert getattr(recalled, name) == getattr(whole, name), name
    assert recalled.best_valid == best


def test_the_best_validation_is_found_in_rows_of_earlier_versions_too(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    add(run.metrics_path, made(1, 300))
    view = View(run, "run", 1000, 10)
    view.recall()
    assert view.best_valid == (10, 11.0) and view.valid == (300, 301.0)
