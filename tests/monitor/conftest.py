"""A stand-in of W&B's server that the real client talks to, and runs whose rows are made up."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from caduceus.config import Config, config_from_dict
from caduceus.monitor.rows import Monitor
from caduceus.monitor.wandb.history import merged, wandb_row
from caduceus.run.directory import RunDirectory
from tests.monitor.wandb_server import KEY, ServerRun, WandbServer
from tests.train.conftest import SmallRun

STEPS = 40


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as served:
        monkeypatch.setenv("WANDB_BASE_URL", served.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield served


@pytest.fixture
def small_run(small_shards: Path, tmp_path: Path) -> SmallRun:
    return SmallRun(small_shards, tmp_path)


@pytest.fixture
def watched(tmp_path: Path) -> "Watched":
    return Watched(tmp_path / "run")


class Watched:
    """A run whose rows are made up: what a trainer does to a run directory and its monitor, without the training."""

    def __init__(self, path: Path, **wandb: Any) -> None:
        self.path = path
        self.config: Config = config_from_dict(
            {
                "train": {"steps": STEPS},
                "run": {"dir": str(path), "name": "watched"},
                "wandb": wandb,
                "monitor": {"report": False, "windows": 0},
            }
        )
        self.run = RunDirectory.create_or_resume(self.config)

    def monitor(self) -> Monitor:
        return Monitor(self.config, self.run, active=True)

    def go_on(self, first: int, last: int, *, stopped: bool = False, shift: int = 0, between: Any = None) -> None:
        """A start that makes steps `first` to `last`, calling `between` with each step before it is made."""
        self.run.truncate_metrics(first - 1)
        with self.monitor() as monitor:
            for step in range(first, last + 1):
                if between is not None:
                    between(step)
                make_step(monitor, step, shift)
            monitor.stopped = stopped

    def rows(self) -> list[dict[str, Any]]:
        """What W&B should have, from metrics.jsonl."""
        return [lasting(wandb_row(row)) for row in merged(self.run.metrics())]


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    """What a making of a step shares with every other: not the time left, nor what W&B's client and events add."""
    return {key: value for key, value in row.items() if not key.startswith(("_", "events/", "perf/seconds_left"))}


def make_step(monitor: Monitor, step: int, shift: int = 0) -> None:
    """A training row, and every tenth step a validation's; `shift` samples were passed over before."""
    row = {
        "step": step,
        "samples": 8 * step + shift,
        "tokens": 1024 * step,
        "loss": 1.4 - step / 100 + shift,
        "lr": 0.1,
    }
    clock = {"tokens_per_second": 100.0, "seconds": 10.24, "peak_memory_bytes": 1 << 20}
    monitor.log_training({**row, "grad_norm": 1.0, "skipped_steps": 0, **clock})
    if step % 10 == 0:
        monitor.log_validation({"step": step, "valid_loss": 1.5 - step / 100, "valid_loss/hg38": 1.5 - step / 100})


def sent_rows(run: ServerRun) -> list[dict[str, Any]]:
    """The server's history without what the client adds to a row, having checked that W&B's own step is the row's."""
    for row in run.history:
        assert row["_step"] == row["step"]
    return [lasting(row) for row in run.history]


def status(path: Path) -> dict[str, Any]:
    return json.loads((path / "wandb" / "status.json").read_text())


def history_of(file: Path) -> list[dict[str, Any]]:
    """The history in a `.wandb` file, without what the client adds to a row."""
    from caduceus.monitor.wandb.offline import read_records

    rows = []
    for record in read_records(file):
        items = record.history.item if record.WhichOneof("record_type") == "history" else []
        row = {(item.nested_key[0] if item.nested_key else item.key): json.loads(item.value_json) for item in items}
        if row:
            rows.append(lasting(row))
    return rows


def children_of(parent: int, name: bytes = b"sender") -> list[int]:
    """The processes below a process whose command line has this name."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if name in (process / "cmdline").read_bytes():
                above = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(process.name)] if above == parent else []
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def write_rows(path: Path, first: int) -> subprocess.Popen:
    """An offline start of a run in a process that can be killed: it makes the steps from `first` on, five a second."""
    command = [sys.executable, "-m", "tests.monitor.rows_writer", str(path), str(first)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "WANDB_API_KEY": ""}
    return subprocess.Popen(command, env=environment)
