"""What happened to a run besides its steps."""

import json
import os
from pathlib import Path

import pytest

from caduceus.errors import UserError
from caduceus.monitor.report.reported import read_run
from caduceus.run.directory import RunDirectory
from caduceus.run.events import events_path, read_events, record_event
from caduceus.train.stopping import EXIT_REQUEUE
from caduceus.train.trainer import train
from caduceus.train.watchdog import Watchdog
from tests.train.conftest import SmallRun


@pytest.fixture
def small_run(small_shards: Path, tmp_path: Path) -> SmallRun:
    return SmallRun(small_shards, tmp_path)


def kinds(run: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in read_events(run)]


@pytest.mark.moderate
def test_starts_checkpoints_and_ends_are_kept_over_starts(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run.config("run", train={"steps": 4}, valid={"every": 0}, run={"time_budget_minutes": 1e-6})
    run = Path(config.run.dir)
    config.checkpoint.every = 2
    assert train(config) == EXIT_REQUEUE
    config.run.time_budget_minutes = 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert train(config) == 0
    expected = [("start", 0), ("checkpoint", 1), ("stopped", 1), ("start", 1)]
    assert kinds(run) == [*expected, ("checkpoint", 2), ("checkpoint", 4), ("finished", 4)]
    events = read_events(run)
    assert [event.get("number") for event in events if event["event"] == "start"] == [1, 2]
    assert [event.get("requeues") for event in events if event["event"] == "start"] == [None, 2]
    assert all(0 <= event["seconds"] < 60 for event in events if event["event"] == "checkpoint")
    told = {event.words for event in read_run(run).events if event.kind == "checkpoint"}
    assert len(told) == 3 and all(" written in " in words for words in told)


@pytest.mark.moderate
def test_what_is_skipped_and_what_fails_is_told(small_run: SmallRun) -> None:
    config = small_run.config("run", train={"steps": 9, "lr": 1e30, "min_lr": 0, "warmup_steps": 0}, valid={"every": 0})
    config.train.max_skipped_steps, config.train.clip_norm = 1, 0
    with pytest.raises(UserError, match=r"train.max_skipped_steps"):
        train(config)
    run = Path(config.run.dir)
    told = kinds(run)
    assert [kind for kind, _ in told if kind == "skipped"] == ["skipped"] * 2 and told[-1][0] == "failed"
    assert "max_skipped_steps" in read_events(run)[-1]["reason"]
    os.utime(run / "metrics.jsonl", (0, 0))
    reported = read_run(run)
    assert reported.state.startswith("failed: failed: UserError: train.max_skipped_steps")
    assert sum(event.kind == "skipped" for event in reported.events) == 2


def test_a_stall_is_told_and_a_spoiled_line_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.Timer", lambda *_: type("Never", (), {"start": lambda self: None})())
    (tmp_path / "logs").mkdir()
    Watchdog(tmp_path / "logs", 3, 0)._end("step 7", 15.0)
    with events_path(tmp_path).open("a") as file:
        file.write('{"event": "unknown"}\n7\nnot JSON\n')
    record_event(tmp_path, "rewind", 5, after=8)
    stalled, rewind = read_events(tmp_path)
    assert "step 7 has taken more than 15 minutes" in stalled["reason"] and rewind["after"] == 8
    record_event(tmp_path / "nowhere", "rewind", 5)  # of no consequence
    assert json.loads(events_path(tmp_path).read_text().splitlines()[-1])["step"] == 5
    assert not RunDirectory(tmp_path / "nowhere").path.exists()
