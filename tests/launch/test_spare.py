"""Whether a job with spare nodes goes on in the nodes that it has, with SLURM's commands replaced."""

import sys

import pytest

from caduceus.config import Config, RunConfig
from caduceus.run.directory import RunDirectory
from launch import history, requeue, spare
from launch.history import RESTART, Reason, Submission, record_submission

NODES = {"n[0-1]": "n0 n1", "n[0-2]": "n0 n1 n2", "n[0,2]": "n0 n2", "n[1-2]": "n1 n2", "n0": "n0"}


@pytest.fixture
def run(tmp_path, monkeypatch, fake_slurm) -> RunDirectory:
    """A run on n0 and n1 of a job with one spare node, whose srun has failed."""
    run = RunDirectory.create_or_resume(Config(run=RunConfig(dir=str(tmp_path / "run"), name="run")))
    run.release()
    request = {"signal_seconds": 120, "requeue": True, "max_failures": 3, "nodes": 2, "spare": 1}
    record_submission(run, Submission(run.path, ["7"], "slurm", run.logs_path, request))
    history.record_attempt(run, "start", "7", 0, nodes="n[0-1]", tasks=2, step=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return run


def goes_on(run: RunDirectory, monkeypatch, fake_slurm, nodes: str, **facts: object) -> int:
    """What launch.spare decides where squeue says that the job has these nodes."""
    fake_slurm.shows(**facts, nodes=nodes)
    cases = " ".join(f"'show hostnames {short}') printf '%s\\n' {names};;" for short, names in NODES.items())
    fake_slurm.answer("scontrol", f'case "$*" in {cases} esac')
    monkeypatch.setattr(sys, "argv", ["spare", str(run.path), "1"])
    return spare.main()


def test_a_lost_node_is_replaced_by_the_spare_one(run, monkeypatch, fake_slurm, capsys):
    assert goes_on(run, monkeypatch, fake_slurm, "n[0,2]") == 0
    out, err = capsys.readouterr()
    assert out == "--overlap --nodelist=n0,n2\n"
    assert err == "n1 lost; the run goes on on n0, n2 of the same job\n"
    [only] = history.attempts(run)
    assert (only.reason, only.error) == (Reason.NODE_LOST, "n1: SLURM has lost it")


@pytest.mark.moderate
def test_a_bad_node_is_replaced_until_no_spare_one_is_left(run, monkeypatch, fake_slurm, capsys):
    history.record_attempt(run, "bad node", "7", 0, node="n0", why="n0: no shared memory")
    assert goes_on(run, monkeypatch, fake_slurm, "n[0-2]") == 0
    assert capsys.readouterr().out == "--overlap --nodelist=n1,n2\n"
    monkeypatch.setenv(RESTART, "1")
    history.record_attempt(run, "start", "7", 1, nodes="n[1-2]", tasks=2, step=0)
    history.record_attempt(run, "bad node", "7", 1, node="n2", why="n2: no shared memory")
    assert goes_on(run, monkeypatch, fake_slurm, "n[0-2]") == 1
    out, err = capsys.readouterr()
    assert not out and err == "n2 failed its checks; no spare node is left\n"
    # The job goes back into the queue, without all that failed in these nodes.
    monkeypatch.setattr(sys, "argv", ["requeue", str(run.path), "1"])
    requeue.main()
    assert [attempt.reason for attempt in history.attempts(run)] == [Reason.BAD_NODE] * 2
    assert "update JobId=7 ExcNodeList=n0,n2" in fake_slurm.asked("scontrol")


@pytest.mark.parametrize(
    ("nodes", "facts"),
    [
        ("n[0-2]", {}),  # a process failed, on no bad node
        ("n0", {}),
        ("n[0,2]", {"preempted": "2026-01-01T00:00:00"}),
        ("n[0,2]", {"state": "TIMEOUT", "reason": "TimeLimit"}),
        ("n[0,2]", {"restarts": 1}),  # SLURM has started the job anew
    ],
)
def test_other_ends_are_left_to_the_queue(run, monkeypatch, fake_slurm, nodes, facts):
    assert goes_on(run, monkeypatch, fake_slurm, nodes, **facts) == 1
    assert history.attempts(run)[0].reason is None


def test_a_run_that_is_told_to_stop_stays_so(run, monkeypatch, fake_slurm):
    run.stop_path.touch()
    assert goes_on(run, monkeypatch, fake_slurm, "n[0,2]") == 1


def test_in_a_container_without_slurm_s_commands_the_job_ends_as_others(run, monkeypatch, fake_slurm, capsys):
    (fake_slurm.folder / "squeue").unlink()
    monkeypatch.setattr(sys, "argv", ["spare", str(run.path), "1"])
    assert spare.main() == 1
    assert "no squeue on this machine" in capsys.readouterr().err
