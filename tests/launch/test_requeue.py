"""The end of a job's processes, with SLURM's commands replaced."""

import sys
import time
from dataclasses import replace

import pytest

from caduceus.config import Config, RunConfig
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import ends_folder, record_end
from launch import history, requeue
from launch.history import Submission, record_submission
from tests.launch.test_history import add_checkpoint


@pytest.fixture
def run(tmp_path, monkeypatch, fake_slurm) -> RunDirectory:
    """A run whose only job is about to end."""
    run = RunDirectory.create_or_resume(Config(run=RunConfig(dir=str(tmp_path / "run"), name="run")))
    run.release()
    request = {"signal_seconds": 120, "requeue": True, "max_failures": 3}
    record_submission(run, Submission(run.path, ["7"], "slurm", run.logs_path, request))
    history.record_attempt(run, "start", "7", 0, nodes="n0", tasks=1, step=0)
    fake_slurm.answer("scontrol", "exit 0")
    fake_slurm.shows()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return run


def ended(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, status: int | str) -> int:
    monkeypatch.setattr(sys, "argv", ["requeue", str(run.path), str(status)])
    return requeue.main()


@pytest.mark.parametrize("refused", [False, True])
def test_a_mistake_of_the_user_does_not_go_back_into_the_queue(run, monkeypatch, fake_slurm, refused, capsys):
    record_end(ends_folder(run.path, "7", 0), 0, UserError("parallel.strategy: single runs on one process"))
    if refused:
        history.record_attempt(run, "refused", "7", 0)
    assert ended(run, monkeypatch, 2) == 1
    assert ("requeue 7" in fake_slurm.asked("scontrol")) is not refused
    assert history.attempts(run)[-1].gave_up is refused
    assert ("given up for a mistake: parallel.strategy: single" in capsys.readouterr().out) is refused


TIMED_OUT = {"state": "TIMEOUT", "reason": "TimeLimit", "left": "0:00"}


def test_a_job_whose_time_is_up_before_its_save_goes_back_into_the_queue(run, monkeypatch, fake_slurm):
    assert ended(run, monkeypatch, "TERM") == 0  # the beginning of a preemption's grace time, or an scancel
    assert history.attempts(run)[-1].reason is None
    fake_slurm.shows(**TIMED_OUT)
    ended(run, monkeypatch, "TERM")
    assert fake_slurm.asked("scontrol").count("requeue 7") == 1
    assert history.attempts(run)[-1].reason == history.Reason.UNSAVED
    ended(run, monkeypatch, 143)  # KillWait was not long enough for the save, but for the processes to end
    assert history.attempts(run)[-1].reason == history.Reason.UNSAVED
    add_checkpoint(run, 5)
    ended(run, monkeypatch, 0)  # it was long enough
    [only] = history.attempts(run)
    assert (only.reason, only.step, only.error) == (history.Reason.TIME_LIMIT, 5, None)
    assert fake_slurm.asked("scontrol").count("requeue 7") == 1, "once is enough"


@pytest.mark.parametrize(("file", "reason"), [("STOP", None), ("attempts.jsonl", history.Reason.UNSAVED)])
def test_a_stopped_run_and_one_whose_saves_never_fit_do_not_go_back(run, monkeypatch, fake_slurm, file, reason, capsys):
    (run.path / file).touch()
    for restart in range(3):
        fake_slurm.shows(**TIMED_OUT, restarts=restart)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        history.record_attempt(run, "start", "7", restart, nodes="n0", tasks=1, step=0)
        ended(run, monkeypatch, "TERM")
    last = history.attempts(run)[-1]
    assert (last.reason, last.gave_up) == (reason, reason is not None)
    assert fake_slurm.asked("scontrol").count("requeue 7") == (2 if reason else 0)
    told = "given up after 3 failures without a new checkpoint; the last one: signal_seconds: 120 s are too short"
    assert (told in capsys.readouterr().out) is (reason is not None)


@pytest.fixture
def without_slurm(run, fake_slurm) -> RunDirectory:
    """The end of a job in a container that has none of SLURM's commands."""
    for command in ("squeue", "scontrol", "scancel", "sinfo", "sacct", "sbatch", "srun"):
        (fake_slurm.folder / command).unlink(missing_ok=True)
    return run


BY_HAND = "the run does not go on by itself: python launch/runs.py resume "


@pytest.mark.parametrize(
    ("status", "minutes_left", "reason"),
    [
        (1, None, history.Reason.FAILED),
        (0, None, history.Reason.SIGNAL),
        (0, 1, history.Reason.TIME_LIMIT),
        (143, -1, history.Reason.TIME_LIMIT),
    ],
)
def test_an_end_in_a_container_without_slurm_s_commands(
    without_slurm, monkeypatch, capsys, status, minutes_left, reason
):
    if minutes_left is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60 * minutes_left))
    assert ended(without_slurm, monkeypatch, status) == 1
    [only] = history.attempts(without_slurm)
    assert (only.reason, only.gave_up) == (reason, False)
    told = capsys.readouterr().out
    assert "SLURM does not answer (no squeue on this machine)" in told
    assert f"{reason}: SLURM does not answer (no scontrol on this machine); {BY_HAND}" in told


def test_a_time_limit_in_such_a_container_is_seen_by_the_clock(without_slurm, monkeypatch):
    assert ended(without_slurm, monkeypatch, "TERM") == 0  # it may be anything
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 1))
    assert ended(without_slurm, monkeypatch, "TERM") == 1
    assert history.attempts(without_slurm)[-1].reason == history.Reason.UNSAVED


@pytest.mark.moderate
def test_a_complete_run_of_a_chain_ends_well_in_such_a_container(without_slurm, monkeypatch, capsys):
    submission = history.submissions(without_slurm)[0]
    record_submission(without_slurm, replace(submission, jobs=["7", "8"]))
    add_checkpoint(without_slurm, without_slurm.config().train.steps)
    assert ended(without_slurm, monkeypatch, 0) == 0
    assert history.attempts(without_slurm)[-1].reason == history.Reason.COMPLETE
    assert "no scancel on this machine" in capsys.readouterr().out


def test_a_chain_goes_on_without_scontrol(without_slurm, monkeypatch, capsys):
    submission = history.submissions(without_slurm)[0]
    chain = replace(submission, jobs=["7", "8"], request={**submission.request, "requeue": False})
    record_submission(without_slurm, chain)
    history.record_attempt(without_slurm, "bad node", "7", 0, node="n3", why="a full disk")
    ended(without_slurm, monkeypatch, 2)
    told = capsys.readouterr().out
    assert "n3 could not be excluded: SLURM does not answer (no scontrol on this machine)" in told
    assert BY_HAND not in told


def test_a_requeue_that_slurm_refuses_is_told_in_a_line(run, monkeypatch, fake_slurm, capsys):
    fake_slurm.answer("scontrol", "echo 'Requested operation is presently disabled for job 7' >&2; exit 1")
    assert ended(run, monkeypatch, 0) == 1
    assert (
        f"scontrol requeue 7: Requested operation is presently disabled for job 7; {BY_HAND}" in capsys.readouterr().out
    )
    assert history.attempts(run)[-1].reason == history.Reason.SIGNAL


def test_what_a_user_wrote_about_a_job_is_none_of_its_state(run, monkeypatch, fake_slurm):
    fake_slurm.shows(reason="JobState=FAILED|Restarts=9", excluded="(null)")
    ended(run, monkeypatch, 0)
    assert history.attempts(run)[-1].reason == history.Reason.SIGNAL
    assert "requeue 7" in fake_slurm.asked("scontrol")


def test_a_job_that_ends_before_its_submission_is_written_down_waits_for_that(run, monkeypatch, fake_slurm):
    path = run.path / "submissions.json"
    path.rename(path.with_suffix(".later"))
    monkeypatch.setattr("time.sleep", lambda seconds: path.with_suffix(".later").rename(path))
    ended(run, monkeypatch, 0)
    assert history.attempts(run)[-1].reason == history.Reason.SIGNAL
