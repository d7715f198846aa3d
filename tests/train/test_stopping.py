"""Stops that come early, late or many times: the exit status tells whether there is a checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caduceus.config import Config, save_config
from caduceus.run.directory import RunDirectory
from caduceus.train import stopping
from caduceus.train.stopping import EXIT_REQUEUE, StopRequest
from caduceus.train.trainer import train
from tests import preloaded
from tests.conftest import REPOSITORY
from tests.train.conftest import SmallRun
from tests.train.faulty_run import hanging

FAULTY = Path(__file__).parent / "faulty_run.py"


@pytest.fixture
def long(small_run: SmallRun) -> Config:
    """A run of which the first step is made, and the last is far."""
    config = small_run.config(
        "long", train={"steps": 2000}, valid={"every": 0}, checkpoint={"every": 5000}, data={"workers": 0}
    )
    config.run.time_budget_minutes = 1e-6  # up after one step
    assert train(config) == EXIT_REQUEUE
    config.run.time_budget_minutes = 0
    return config


def step_of(process: subprocess.Popen, run: RunDirectory, step: int) -> None:
    """Wait until a process has made a step."""
    while not (rows := run.metrics()) or rows[-1]["step"] < step:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]


@pytest.mark.slow
def test_stop_touched_before_the_first_step_is_honoured(small_run: SmallRun, long: Config) -> None:
    run = RunDirectory(long.run.dir)
    process = small_run.start(long)
    time.sleep(0.1)  # it has begun, and makes no step yet
    run.stop_path.touch()
    message = process.communicate(timeout=300)[1]
    assert process.returncode == EXIT_REQUEUE, message
    assert run.checkpoints()[-1].step == 2 and run.stop_path.exists()


@pytest.mark.slow
def test_stop_touched_before_torchrun_has_started_its_ranks_is_honoured(small_run: SmallRun, long: Config) -> None:
    run, path = RunDirectory(long.run.dir), small_run.directory / "long.yaml"
    save_config(long, path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    process = subprocess.Popen(
        [*command, str(FAULTY), str(path)], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    time.sleep(0.1)
    run.stop_path.touch()
    message = process.communicate(timeout=300)[1]
    assert "stopped after step 2 with a checkpoint" in message
    assert run.checkpoints()[-1].step == 2


@pytest.mark.slow
def test_a_stop_of_an_earlier_start_is_removed_and_told(small_run: SmallRun, long: Config) -> None:
    run = RunDirectory(long.run.dir)
    run.stop_path.touch()
    time.sleep(0.1)
    process = small_run.start(long)
    step_of(process, run, 4)
    assert not run.stop_path.exists()
    process.send_signal(signal.SIGTERM)
    assert "STOP: removed, as it was for an earlier start" in process.communicate(timeout=300)[1]
    assert process.returncode == EXIT_REQUEUE


@pytest.mark.parametrize(("lead", "kept"), [(0.0, False), (-3600.0, True)])
def test_the_clock_of_a_file_server_decides_nothing(tmp_path: Path, monkeypatch, lead: float, kept: bool) -> None:
    run = RunDirectory(tmp_path)
    run._lock.file_clock_lead = lead
    run.stop_path.touch()
    os.utime(run.stop_path, (time.time() - 1800,) * 2)  # half an hour ago, or ahead of a server an hour behind
    monkeypatch.setattr(stopping, "_command_began", lambda: time.time() - 60)
    StopRequest(run, True, time.monotonic(), 0)
    assert run.stop_path.exists() is kept


def test_files_are_looked_for_once_a_second_however_short_a_step_is(tmp_path: Path, monkeypatch) -> None:
    run, now, looks = RunDirectory(tmp_path), [100.0], []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "is_taken_over", lambda: bool(looks.append(now[0])))
    stop = StopRequest(run, True, 0.0, 0)
    for step in range(300):  # 30 seconds of steps of a tenth
        now[0] = 100 + step / 10
        assert (stop.requested, stop.save_requested(), stop.taken_over()) == (False, step == 110, False)
        if step == 101:
            run.save_path.touch()
    assert looks == [100.0 + second for second in range(30)]
    run.stop_path.touch()
    assert not stop.requested
    now[0] += 1
    assert stop.requested


def test_a_job_of_the_launcher_honours_every_stop(tmp_path: Path, monkeypatch) -> None:
    run = RunDirectory(tmp_path)
    run.stop_path.touch()
    os.utime(run.stop_path, (0, 0))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert StopRequest(run, True, time.monotonic(), 0).requested


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGINT] * 4, [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]])
def test_impatient_signals_change_nothing_of_the_end(small_run: SmallRun, long: Config, signals: list[int]) -> None:
    run = RunDirectory(long.run.dir)
    process = small_run.start(long)
    step_of(process, run, 3)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    while run.checkpoints()[-1].step == 1 and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    while process.poll() is None:  # while it closes what it has open, and leaves
        process.send_signal(signals[0])
        time.sleep(0.05)
    message = process.communicate()[1]
    assert process.returncode == EXIT_REQUEUE, message
    assert run.checkpoints()[-1].step == run.metrics()[-1]["step"] >= 3


@pytest.mark.slow
def test_a_second_ctrl_c_after_a_moment_ends_at_once_whatever_follows(small_run: SmallRun, long: Config) -> None:
    run, path = RunDirectory(long.run.dir), small_run.directory / "long.yaml"
    save_config(long, path)
    command = [sys.executable, str(FAULTY), str(path), "hang", "0", "4"]
    process = preloaded.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    while not hanging(long).exists():
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    time.sleep(stopping._SAME_SECONDS + 0.2)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    message = process.communicate()[1]
    assert process.returncode == 130 and "Ctrl-C again ends without one" in message, message
    assert "Traceback" not in message
    assert run.checkpoints()[-1].step == 1
