"""A job of this machine: Ctrl-C, a process that dies, and cancelling."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from caduceus.run.directory import RunDirectory
from launch.history import attempts
from launch.status import overview
from tests.conftest import REPOSITORY
from tests.slurm.small_runs import PATIENCE, command, held, process_of, wait_until_training, write_config

pytestmark = pytest.mark.slow


def start(directory: Path, config: Path) -> subprocess.Popen:
    line = [sys.executable, str(REPOSITORY / "launch" / "slurm.py"), "--config", str(config), "--cluster", "local"]
    return subprocess.Popen(
        [*line, "--tasks-per-node", "2", "run.dir=run"],
        cwd=directory,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C reaches the whole session
    )


def test_a_local_job_is_interrupted_killed_and_cancelled(small_shards, tmp_path):
    config = write_config(tmp_path / "small.yaml", small_shards, train="{steps: 400, global_batch: 4, micro_batch: 1}")
    run = tmp_path / "run"
    job = start(tmp_path, config)
    wait_until_training(run, 1)
    assert overview(RunDirectory(run)).state == "running"
    os.killpg(job.pid, signal.SIGINT)
    output, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 75 and "stopping after this step" in output
    stopped = overview(RunDirectory(run))
    assert (stopped.state, stopped.checkpoint) == ("stopped", stopped.step)

    job = start(tmp_path, config)
    wait_until_training(run, 2)
    with held(run, rank=0):  # it would see by itself that the other rank is gone
        os.kill(process_of(run, rank=1), signal.SIGKILL)
        output, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 1 and "rank 1 ended with status -9" in output
    assert overview(RunDirectory(run)).state == "failed"

    job = start(tmp_path, config)
    wait_until_training(run, 3)
    cancelled = command("runs", tmp_path, "cancel", "run")
    assert not overview(RunDirectory(run)).live
    again = start(tmp_path, config)  # at once: the cancelled one may still be on its way out
    assert cancelled.returncode == 0 and "its newest checkpoint is of step " in cancelled.stdout
    job.communicate(timeout=PATIENCE)
    assert job.returncode == 1
    wait_until_training(run, 4)
    assert [attempt.reason for attempt in attempts(RunDirectory(run))] == ["stopped", "failed", "cancelled", None]
    again.kill()  # the command that would write down the end; the job goes on without it
    assert command("runs", tmp_path, "cancel", "run").returncode == 0
    again.communicate(timeout=PATIENCE)
    assert overview(RunDirectory(run)).state == attempts(RunDirectory(run))[-1].reason == "cancelled"
