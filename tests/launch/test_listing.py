"""The table of runs: what is remembered between two looks, and how often SLURM is asked."""

import json
import os
import time

import pytest

from caduceus.config import Config, RunConfig
from caduceus.run.directory import RunDirectory
from launch import history, listing
from launch.history import Submission, record_submission
from launch.listing import list_runs
from tests.launch.test_history import add_checkpoint


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[RunDirectory]:
    """Three runs that were stopped, long ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []
    for name in ("a", "b", "sweep/c"):
        run = RunDirectory.create_or_resume(Config(run=RunConfig(dir=str(tmp_path / "runs" / name), name=name)))
        run.release()
        run.metrics_path.write_text('{"step": 1, "loss": 1.0, "tokens_per_second": 1.0, "seconds": 1.0}\n')
        run.stop_path.touch()
        made.append(run)
        age(run)
    return made


def age(run: RunDirectory) -> None:
    for path in [run.path, *run.path.rglob("*")]:
        os.utime(path, (1e9, 1e9))


def looked_at(monkeypatch, directory) -> tuple[list[str], list[str]]:
    """The rows of the table, and the names of the runs that were read for it."""
    looked = []
    overview = listing.overview
    with monkeypatch.context() as patch:
        patch.setattr(listing, "overview", lambda run, jobs: looked.append(run.path.name) or overview(run, jobs))
        return list_runs(directory).splitlines()[1:], looked


def test_runs_that_are_over_are_read_once_until_they_change(runs, tmp_path, monkeypatch):
    rows, looked = looked_at(monkeypatch, tmp_path / "runs")
    assert looked == ["a", "b", "c"] and [row.split()[1:4] for row in rows] == 3 * [["stopped", "1/10,000", "1.0000"]]
    assert looked_at(monkeypatch, tmp_path / "runs") == (rows, [])
    with runs[1].metrics_path.open("a") as file:
        file.write('{"step": 2, "loss": 0.5, "tokens_per_second": 1.0, "seconds": 1.0}\n')
    changed, looked = looked_at(monkeypatch, tmp_path / "runs")
    assert looked == ["b"] and changed[1].split()[2:4] == ["2/10,000", "0.5000"]
    assert looked_at(monkeypatch, tmp_path / "runs")[1] == ["b"]  # it changed a moment ago, and may again
    age(runs[1])
    assert looked_at(monkeypatch, tmp_path / "runs") == (changed, ["b"])
    assert looked_at(monkeypatch, tmp_path / "runs") == (changed, [])


@pytest.mark.parametrize("change", ["resumed", "checkpoint", "unwritable home"])
def test_a_run_that_goes_on_is_not_shown_as_it_was(runs, tmp_path, monkeypatch, change):
    if change == "unwritable home":
        (tmp_path / "cache").write_text("a file")
    looked_at(monkeypatch, tmp_path / "runs")
    if change == "resumed":
        holder = RunDirectory.create_or_resume(runs[0].config())
        rows, looked = looked_at(monkeypatch, tmp_path / "runs")
        holder.release()
        assert looked == ["a"] and rows[0].split()[1] == "stopping"
    elif change == "checkpoint":
        add_checkpoint(runs[0], runs[0].config().train.steps)
        rows, looked = looked_at(monkeypatch, tmp_path / "runs")
        assert looked == ["a"] and rows[0].split()[1] == "complete"
    else:
        assert looked_at(monkeypatch, tmp_path / "runs")[1] == ["a", "b", "c"]


def test_slurm_is_asked_once_about_all_runs_and_one_that_waits_again_is_seen(runs, fake_slurm, tmp_path, monkeypatch):
    for number, run in enumerate(runs):
        record_submission(run, Submission(run.path, [str(12 + number)], "slurm", run.logs_path, {}))
        history.record_attempt(run, "start", str(12 + number), 0, nodes="n", tasks=1, step=0)
        history.record_attempt(run, "end", str(12 + number), 0, reason=history.Reason.STOPPED, step=0, error=None)
        age(run)
    for expected in (["a", "b", "c"], []):
        assert looked_at(monkeypatch, tmp_path / "runs")[1] == expected
    assert [call.split()[2] for call in fake_slurm.asked("squeue")] == 2 * ["--jobs=12,13,14"]
    fake_slurm.answer("squeue", "echo '13|13_N/A|PENDING|BeginTime'")
    rows, looked = looked_at(monkeypatch, tmp_path / "runs")
    assert looked == ["b"] and rows[1].split()[1] == "waiting"
    fake_slurm.answer("squeue", "exit 0")
    assert looked_at(monkeypatch, tmp_path / "runs")[1] == []


def test_a_remembered_table_reads_only_times(runs, tmp_path, monkeypatch):
    list_runs(tmp_path / "runs")
    remembered = next((tmp_path / "cache" / "caduceus" / "runs").iterdir())
    assert len(json.loads(remembered.read_text())) == 3
    remembered.write_text("[{")
    began = time.monotonic()
    assert len(list_runs(tmp_path / "runs").splitlines()) == 4 and time.monotonic() - began < 5
