"""What becomes of a run whose Weights & Biases client fails: the real client, offline."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from caduceus.config import Config
from caduceus.run.directory import RunDirectory
from caduceus.train.stopping import EXIT_REQUEUE
from tests.train.conftest import SmallRun

pytestmark = pytest.mark.slow

STEPS = 150


@pytest.fixture
def config(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sections = {"train": {"steps": STEPS}, "valid": {"every": 50}, "checkpoint": {"every": 1000}}
    return small_run.config("watched", wandb={"mode": "offline"}, **sections)


def start_and_kill_the_service(small_run: SmallRun, config: Config) -> subprocess.Popen:
    """A training whose W&B service process was killed after a few steps."""
    process, run = small_run.start(config), RunDirectory(config.run.dir)
    while len(run.metrics()) < 3:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
    (service,) = service_processes(process.pid)
    os.kill(service, signal.SIGKILL)
    return process


def service_processes(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    children = [int(pid) for children in tasks for pid in children.read_text().split()]
    return [pid for pid in children if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_run_survives_its_service_and_resumes_the_same_wandb_run(small_run: SmallRun, config: Config) -> None:
    process = start_and_kill_the_service(small_run, config)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 0, message
    run = RunDirectory(config.run.dir)
    assert [row["step"] for row in run.metrics() if "loss" in row] == list(range(1, STEPS + 1))
    assert sum("wandb" in line and "goes on without" in line for line in message.splitlines()) == 1, message
    assert "Traceback" not in message
    config.train.steps, config.run.allow_change = STEPS + 2, ["train.steps"]
    process = small_run.start(config)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 0, message
    directories = list((run.path / "wandb").glob("offline-run-*"))
    assert len(directories) == 2
    assert len({path.name.rsplit("-", 1)[1] for path in directories}) == 1


def test_what_a_killed_start_leaves_is_in_the_run_and_goes_at_the_next(
    small_run: SmallRun, config: Config, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "system").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "system"))
    process, run = small_run.start(config), RunDirectory(config.run.dir)
    while len(run.metrics()) < 3:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
    process.kill()
    process.communicate()
    left = {path.name for path in (run.path / "wandb" / "tmp").iterdir()}
    assert any("wandb-media" in name for name in left) and any("wandb-artifacts" in name for name in left)
    assert not list((tmp_path / "system").glob("*wandb*"))
    config.train.steps, config.run.allow_change = 6, ["train.steps"]
    for mode in ("offline", "disabled"):  # a start without W&B tidies up as well
        (run.path / "wandb" / "tmp" / f"left before {mode}").mkdir(parents=True, exist_ok=True)
        config.wandb.mode = mode
        process = small_run.start(config)
        message = process.communicate(timeout=300)[1]
        assert process.returncode == 0, message
        assert not list((run.path / "wandb").glob("tmp/*"))


def test_a_stop_signal_that_also_ends_the_service_still_saves(small_run: SmallRun, config: Config) -> None:
    process = start_and_kill_the_service(small_run, config)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == EXIT_REQUEUE, message
    run = RunDirectory(config.run.dir)
    (checkpoint,) = run.checkpoints()
    assert checkpoint.damage() is None and checkpoint.step == run.metrics()[-1]["step"] < STEPS
    assert json.loads((checkpoint.path / "progress.json").read_text())["wandb_id"]
    assert "Traceback" not in message
