"""What launch/runs.py makes of run directories that something has gone wrong with."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from caduceus.config import Config, RunConfig
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from launch import history
from launch.runs import find_runs, summary
from tests.conftest import REPOSITORY


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory.create_or_resume(Config(run=RunConfig(dir=str(tmp_path / "runs" / "good"), name="good")))
    run.release()
    return run


def test_a_cut_line_of_the_metrics_is_passed_over(run):
    rows = [json.dumps({"step": step, "loss": 1.0, "tokens_per_second": 1.0, "seconds": 1.0}) for step in (1, 2)]
    run.metrics_path.write_text(rows[0] + "\n" + rows[0][:9] + "\n" + rows[1] + "\n" + rows[0][:9])
    assert [row["step"] for row in run.metrics()] == [1, 2]


NO_JOB = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.mark.parametrize(
    ("squeue", "sacct", "ended"),
    [
        (NO_JOB, "echo RUNNING", "is no longer known to SLURM"),  # accounting never heard of its end
        (NO_JOB, "echo NODE_FAIL", "ended as NODE_FAIL"),
        ('case "$*" in *--states=all*) echo TIMEOUT;; esac', "exit 1", "ended as TIMEOUT"),
    ],
)
@pytest.mark.parametrize("lives_on", [False, True])
def test_a_run_whose_job_is_gone_is_lost(run, steer, fake_slurm, monkeypatch, capsys, squeue, sacct, ended, lives_on):
    fake_slurm.answer("squeue", squeue)
    fake_slurm.answer("sacct", sacct)
    submission = {"jobs": ["12"], "executor": "slurm", "logs": str(run.logs_path), "request": {}}
    (run.path / "submissions.json").write_text(json.dumps([submission]))
    history.record(run, "start", "12", 0, nodes="n[0-1]", tasks=2, step=0)
    run.metrics_path.write_text('{"step": 1, "loss": 1.0, "tokens_per_second": 1.0, "seconds": 1.0}\n')
    (run.logs_path / "12_1_log.out").write_text("ready to train\n")
    os.utime(run.metrics_path, (1e9, 1e9))
    os.utime(run.logs_path / "12_1_log.out", (1e9 - 60, 1e9 - 60))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    holder = RunDirectory.create_or_resume(run.config()) if lives_on else None
    steer("status", str(run.path))
    last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1e9))
    state = f"state       lost: job 12 {ended}; last sign of life: {last}"
    if holder:
        state += f"; process {os.getpid()} of SLURM job 12 on {socket.gethostname()} lives on: end it, or resume"
        holder.release()
    assert f"{state}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="neither runs nor waits; it is lost"):
        steer("stop", str(run.path))


def test_of_a_job_that_slurm_does_not_speak_of_nothing_is_said(run, steer, fake_slurm, monkeypatch, capsys):
    fake_slurm.answer("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    submission = {"jobs": ["12"], "executor": "slurm", "logs": str(run.logs_path), "request": {}}
    (run.path / "submissions.json").write_text(json.dumps([submission]))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    holder = RunDirectory.create_or_resume(run.config())
    steer("status", str(run.path))
    assert "state       running\n" in capsys.readouterr().out
    holder.release()


@pytest.mark.parametrize("text", ["[{", "{}}", '[{"jobs": []}]', "[1]"])
def test_a_run_that_cannot_be_read_does_not_hide_the_others(run, steer, text, capsys):
    broken = run.path.with_name("broken")
    shutil.copytree(run.path, broken)
    (broken / "submissions.json").write_text(text)
    _, first, second = summary(find_runs(run.path.parent)).splitlines()
    assert first.split()[:2] == [str(broken), "unreadable"] and second.split()[:2] == [str(run.path), "new"]
    assert "broken/submissions.json: cannot be read" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"submissions\.json: cannot be read"):
        steer("stop", str(broken))


def test_a_reader_that_has_seen_enough(run):
    (run.path / "submissions.json").write_text(
        json.dumps([{"jobs": ["7"], "executor": "local", "logs": str(run.logs_path), "request": {}}])
    )
    (run.logs_path / "7_0_log.out").write_text("a line\n" * 100_000)
    command = [sys.executable, str(REPOSITORY / "launch" / "runs.py"), "logs", str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as logs:
        assert logs.stdout.readline() == "a line\n"
        logs.stdout.close()
        assert logs.stderr.read() == ""
