"""The end of a job's processes, with SLURM's commands replaced."""

import sys

import pytest

from caduceus.config import Config, RunConfig
from caduceus.run_directory import RunDirectory
from launch import history, requeue
from launch.submission import Submission, record

SHOWN = "JobId=7 JobState=RUNNING Reason=None EndTime=Unknown ExcNodeList=(null) Restarts=0"


@pytest.fixture
def run(tmp_path, monkeypatch, fake_slurm) -> RunDirectory:
    """A run whose only job is about to end."""
    run = RunDirectory.create_or_resume(Config(run=RunConfig(dir=str(tmp_path / "run"), name="run")))
    run.release()
    request = {"signal_seconds": 120, "requeue": True, "max_failures": 3}
    record(run, Submission(run.path, ["7"], "slurm", run.logs_path, request))
    history.record(run, "start", "7", 0, nodes="n0", tasks=1, step=0)
    fake_slurm.answer("scontrol", f"echo '{SHOWN}'")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return run


def ended(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, status: int) -> int:
    monkeypatch.setattr(sys, "argv", ["requeue", str(run.path), str(status)])
    return requeue.main()


@pytest.mark.parametrize("refused", [False, True])
def test_a_mistake_of_the_user_does_not_go_back_into_the_queue(run, monkeypatch, fake_slurm, refused, capsys):
    (run.logs_path / "7_0_log.out").write_text("error: parallel.strategy: single runs on one process\n")
    if refused:
        history.record(run, "refused", "7", 0)
    assert ended(run, monkeypatch, 2) == 1
    assert ("requeue 7" in fake_slurm.asked("scontrol")) is not refused
    assert history.attempts(run)[-1].gave_up is refused
    assert ("given up for a mistake: parallel.strategy: single" in capsys.readouterr().out) is refused
