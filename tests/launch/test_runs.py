"""What launch/runs.py makes of run directories that something has gone wrong with."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from caduceus.config import Config, RunConfig
from caduceus.errors import UserError
from caduceus.monitor.wandb.identity import Identity, Status, keep_identity, keep_status
from caduceus.run.directory import RunDirectory
from launch import history
from launch.history import Submission, record_submission
from launch.listing import list_runs
from launch.status import overview
from tests import preloaded
from tests.conftest import REPOSITORY
from tests.launch.test_history import add_checkpoint


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory.create_or_resume(Config(run=RunConfig(dir=str(tmp_path / "runs" / "good"), name="good")))
    run.release()
    return run


def test_the_address_of_a_run_in_wandb_is_told(run, steer, capsys):
    assert list_runs(run.path.parent).splitlines()[-1].endswith(" -")
    keep_identity(run.path, Identity("abc"))  # makes the folder
    keep_status(run.path, Status("online", 2, url="https://wandb.example/lab/genomes/runs/abc"))
    heads, *_, row = list_runs(run.path.parent).splitlines()
    assert heads.endswith("W&B") and row.endswith("https://wandb.example/lab/genomes/runs/abc")
    steer("status", str(run.path))
    assert "online, has step 2   https://wandb.example/lab/genomes/runs/abc" in capsys.readouterr().out


def test_starts_by_hand_and_of_jobs_are_counted_and_told(run, steer, capsys):
    run.write_provenance({"step": 0})  # by a version that did not note whether there was a job
    assert list_runs(run.path.parent).splitlines()[-1].split()[-2] == "1"
    history.record_attempt(run, "start", "7", 0, nodes="n0", step=0)
    assert overview(run).starts == 1  # the job's
    for in_job in (True, False, False):
        run.write_provenance({"step": 1000, "in_job": in_job})
    assert list_runs(run.path.parent).splitlines()[-1].split()[-2] == "3"
    steer("status", str(run.path))
    told = capsys.readouterr().out
    host = run.starts()[0]["host"]
    assert told.count(f"on {host}, without a job, from step 1,000") == 2 and told.count("  job 7") == 1


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
    history.record_attempt(run, "start", "12", 0, nodes="n[0-1]", tasks=2, step=0)
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
        state += f"; process {os.getpid()} of SLURM job 12 on {socket.gethostname()} still runs: end it, or resume"
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
    _, first, second = list_runs(run.path.parent).splitlines()
    assert first.split()[:2] == [str(broken), "unreadable"] and second.split()[:2] == [str(run.path), "new"]
    assert "broken/submissions.json: cannot be read" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"submissions\.json: cannot be read"):
        steer("stop", str(broken))


@pytest.mark.moderate
def test_a_reader_that_has_seen_enough(run):
    (run.path / "submissions.json").write_text(
        json.dumps([{"jobs": ["7"], "executor": "local", "logs": str(run.logs_path), "request": {}}])
    )
    (run.logs_path / "7_0_log.out").write_text("a line\n" * 100_000)
    command = [sys.executable, str(REPOSITORY / "launch" / "runs.py"), "logs", str(run.path)]
    with preloaded.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as logs:
        assert logs.stdout.readline() == "a line\n"
        logs.stdout.close()
        assert logs.stderr.read() == ""


def submitted(run: RunDirectory, job: str = "12") -> None:
    record_submission(run, Submission(run.path, [job], "slurm", run.logs_path, {}))


def test_a_followed_log_waits_for_its_run_and_goes_over_to_the_next_job(run, steer, fake_slurm, monkeypatch, capfd):
    monkeypatch.setattr("launch.runs._ASK_SECONDS", 0.2)
    submitted(run)

    def happens() -> None:
        time.sleep(1)
        for job in ("12", "13"):
            if job == "13":
                submitted(run, job)
            fake_slurm.answer("squeue", f"echo '{job}|{job}_N/A|RUNNING|None'")
            (run.logs_path / f"{job}_0_log.out").write_text(f"job {job} trains\n")
            history.record_attempt(run, "start", job, 0, nodes="n0", tasks=1, step=0)
            time.sleep(1)
            history.record_attempt(run, "end", job, 0, reason="time limit", step=0, error=None, status=0)
        fake_slurm.answer("squeue", NO_JOB)

    fake_slurm.answer("squeue", "echo '12|12_N/A|PENDING|Resources'")
    with pytest.raises(UserError, match=r"the run waits to start; python launch/runs.py logs -f .* waits with it"):
        steer("logs", str(run.path))
    thread = threading.Thread(target=happens)
    thread.start()
    assert steer("logs", "-f", str(run.path)) == 0
    thread.join()
    printed = capfd.readouterr()
    assert printed.out == "job 12 trains\njob 13 trains\n"
    assert "waits to start (Resources)" in printed.err


def test_a_followed_log_of_a_run_that_never_starts_ends(run, steer, fake_slurm, monkeypatch):
    monkeypatch.setattr("launch.runs._ASK_SECONDS", 0.2)
    submitted(run)
    fake_slurm.answer("squeue", "echo '12|12_N/A|PENDING|Resources'")
    threading.Timer(1, lambda: fake_slurm.answer("squeue", NO_JOB)).start()
    with pytest.raises(UserError, match="there is no such log; the run is new"):
        steer("logs", "-f", str(run.path))


@pytest.mark.parametrize("saves", [True, False])
def test_cancelling_tells_of_the_checkpoint_that_the_run_made_last(run, steer, fake_slurm, capsys, tmp_path, saves):
    """On SIGTERM the processes still save, as long as SLURM lets them."""
    submitted(run)
    history.record_attempt(run, "start", "12", 0, nodes="n0", tasks=1, step=0)
    cancelled, ended = tmp_path / "cancelled", tmp_path / "ended"
    fake_slurm.answer("squeue", f"[ -e {ended} ] || echo '12|12_N/A|RUNNING|None'")
    fake_slurm.answer("scancel", f": > {cancelled}")

    def ends() -> None:
        while not cancelled.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        if saves:
            add_checkpoint(run, 7)
        ended.touch()

    thread = threading.Thread(target=ends)
    thread.start()
    steer("cancel", str(run.path))
    thread.join()
    told = capsys.readouterr().out
    left = f"its newest checkpoint is of step 7: {run.checkpoint_path(7)}" if saves else "there is no checkpoint of it"
    assert told == f"{run.path}: cancelled at step 0; {left}\n"


@pytest.mark.parametrize("look", ["status", "list"])
def test_an_attempt_without_an_end_gets_one_at_the_next_look(run, steer, fake_slurm, capsys, look):
    submitted(run)
    history.record_attempt(run, "start", "12", 0, nodes="n0", tasks=1, step=0)
    looks = {"status": str(run.path), "list": str(run.path.parent)}
    for answer in ("echo '12|12_N/A|RUNNING|None'", "echo 'Unable to contact slurm controller' >&2; exit 1"):
        fake_slurm.answer("squeue", answer)
        steer(look, looks[look])
        assert history.attempts(run)[-1].ended is None, "it lives, or SLURM does not tell"
    fake_slurm.answer("squeue", NO_JOB)
    fake_slurm.answer("sacct", "echo NODE_FAIL")
    steer(look, looks[look])
    [only] = history.attempts(run)
    assert only.ended and only.reason == history.Reason.LOST and "job 12 ended as NODE_FAIL" in only.error
    before = (run.path / "attempts.jsonl").read_text()
    fake_slurm.answer("sacct", "exit 1")  # by now SLURM has forgotten it
    capsys.readouterr()
    steer("status", str(run.path))
    assert "state       lost: job 12 ended as NODE_FAIL" in capsys.readouterr().out
    assert (run.path / "attempts.jsonl").read_text() == before, "once is enough"


def test_the_end_that_an_attempt_had_written_down_is_not_overwritten(run, steer, fake_slurm):
    submitted(run)
    history.record_attempt(run, "start", "12", 0, nodes="n0", tasks=1, step=0)
    row = '{"event": "end", "time": "T", "job": "12", "restart": 0, "reason": "signal", "step": 0, "error": null}'
    # It comes between the question to SLURM and its answer.
    fake_slurm.answer("squeue", f"echo '{row}' >> {run.path}/attempts.jsonl; {NO_JOB}")
    assert overview(run).state == "interrupted"
    assert history.attempts(run)[-1].reason == history.Reason.SIGNAL


def test_a_complete_run_whose_last_checkpoint_was_deleted_can_go_on(run, steer, fake_slurm):
    submitted(run)
    fake_slurm.answer("squeue", NO_JOB)
    history.record_attempt(run, "start", "12", 0, nodes="n0", tasks=1, step=0)
    history.record_attempt(run, "end", "12", 0, reason=history.Reason.COMPLETE, step=9, error=None, status=0)
    now = overview(run)
    assert (now.state, now.why) == ("interrupted", "the checkpoint of its last step is gone; resume makes it again")
