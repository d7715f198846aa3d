"""The door to SLURM on a real one, whatever the user's environment has, and what it takes for an answer."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from caduceus.run.directory import RunDirectory
from launch import scheduler
from launch.history import submissions
from launch.scheduler import JobState
from launch.status import overview
from tests.conftest import REPOSITORY
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.small_runs import PATIENCE, REQUEST, job_of, launch, runs, state_of, wait_until

pytestmark = pytest.mark.slow

HOSTILE = {
    "SLURM_CLUSTERS": "onemachine",  # this one is kept
    "SLURM_TIME_FORMAT": "relative",
    "SQUEUE_STATES": "CANCELLED",
    "SQUEUE_PARTITION": "urgent",
    "SQUEUE_USERS": "nobody",
    "SQUEUE_ACCOUNT": "other",
    "SQUEUE_NAMES": "other",
    "SQUEUE_QOS": "other",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_SORT": "-i",
    "SINFO_PARTITION": "urgent",
    "SINFO_FORMAT": "%P",
    "SCANCEL_STATE": "PENDING",
    "SCANCEL_NAME": "other",
    "SCANCEL_PARTITION": "urgent",
    "SACCT_FORMAT": "JobID",
    "SBATCH_PARTITION": "urgent",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_JOB_NAME": "other",
    "SBATCH_OUTPUT": "/dev/null",
    "SBATCH_HOLD": "1",
    "SLURM_MEM_PER_CPU": "1",
}
TELLING_LIES = "JobState=FAILED Restarts=9|FAILED|9 Reason=TimeLimit"


@pytest.fixture
def hostile(slurm_cluster, monkeypatch) -> Cluster:
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    return slurm_cluster


def plain(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, *command: str) -> str:
    """What a command answers in an environment without those settings."""
    with monkeypatch.context() as patched:
        for name in HOSTILE:
            patched.delenv(name, raising=False)
        return cluster.run(*command).strip()


def test_the_user_s_environment_changes_no_answer(hostile, monkeypatch, tmp_path):
    def submit(*options: str) -> str:
        options = ("--parsable", "--output=/dev/null", f"--comment={TELLING_LIES}", *options)
        return plain(hostile, monkeypatch, "sbatch", *options, "--wrap", "sleep 1000")

    alone, array = submit("--exclude=n3", "--time=60"), submit("--array=0-1", "--time=60")
    held, tasks = submit("--hold"), [f"{array}_0", f"{array}_1"]
    everything = [alone, *tasks, held]
    wait_until(
        lambda: [job.state for job in scheduler.live_jobs(everything).values()],
        lambda states: states.count("RUNNING") == 3,
        "three running jobs",
    )
    assert scheduler.live_jobs([held, "999999"]) == {held: JobState("PENDING", "JobHeldUser")}
    assert {row.partition for row in scheduler.nodes()} == {"main", "urgent"}
    own = scheduler.own_job(alone)
    assert (own.state, own.reason, own.preempted, own.excluded, own.restarts) == ("RUNNING", "None", False, "n3", 0)
    assert 3000 < own.seconds_left <= 3600
    assert scheduler.own_job(tasks[1]).state == "RUNNING"
    scheduler.requeue(tasks[1])
    wait_until(lambda: scheduler.own_job(tasks[1]).restarts, (1).__eq__, "the second start")
    scheduler.exclude_nodes(held, "n[0-1]")
    assert scheduler.own_job(held).excluded == "n[0-1]" and scheduler.own_job(held).seconds_left < math.inf
    scheduler.cancel([alone, "999999"])
    scheduler.cancel(everything)
    wait_until(lambda: scheduler.live_jobs(everything), lambda found: not found, "the end of the jobs")
    assert scheduler.end_of(alone) == "CANCELLED"
    assert scheduler.end_of("999999") is None


def test_a_submission_is_what_was_asked_for_and_its_run_is_not_taken_for_new(hostile, config, monkeypatch, tmp_path):
    result = launch(tmp_path, "--config", config, *REQUEST, "--sbatch", "comment=" + TELLING_LIES, "run.dir=run")
    job, run = job_of(result), RunDirectory(tmp_path / "run")
    named = ", ".join(sorted(name for name in HOSTILE if name.startswith("SBATCH_")))
    assert result.stderr.count(f"note: {named}: set in the environment and not used") == 1
    scheduler.cancel([job])
    wait_until(lambda: scheduler.live_jobs([job]), lambda found: not found, "the end of the job")
    shown = plain(hostile, monkeypatch, "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%P %l %j")
    assert shown == "main 1-00:00:00 small"
    assert plain(hostile, monkeypatch, "scontrol", "show", "job", job).count(f"StdOut={run.logs_path}/{job}_0_log.out")
    held = job_of(launch(tmp_path, "--config", config, *REQUEST, "--sbatch", "hold", "run.dir=run"))
    assert overview(run).jobs == [held]
    assert "state       waiting: JobHeldUser" in runs(tmp_path, "status", "run")
    again = launch(tmp_path, "--config", config, *REQUEST, "run.dir=run")
    assert again.returncode == 2 and f"run is in use by job {held}" in again.stderr
    assert "cancelled at step 0" in runs(tmp_path, "cancel", "run")
    assert not scheduler.live_jobs([held])


def test_two_submissions_at_once_are_one_job(slurm_cluster, config, tmp_path):
    line = [sys.executable, str(REPOSITORY / "launch" / "slurm.py"), "--config", str(config), *REQUEST]
    line += ["--sbatch", "hold", f"run.dir={tmp_path / 'run'}"]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=PATIENCE) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], told
    [submission] = submissions(RunDirectory(tmp_path / "run"))
    assert slurm_cluster.run("squeue", "--noheader", "--format=%A").split() == submission.jobs


@pytest.mark.parametrize(("state", "told"), [("DRAIN", "drained"), ("FAIL", "fail")])
def test_where_every_node_is_away_a_run_is_queued_and_starts_when_they_are_back(
    slurm_cluster, config, tmp_path, state, told
):
    slurm_cluster.run("scontrol", "update", f"NodeName={','.join(NODES)}", f"State={state}", "Reason=test")
    try:
        result = launch(tmp_path, "--config", config, *REQUEST, "--nodes", "2", f"run.dir={tmp_path / state}")
        job = job_of(result)
        assert f"note:          the job will wait, as nodes that it needs are {told} now" in result.stdout
        assert state_of(slurm_cluster, job) == "PENDING"
        never = launch(tmp_path, "--config", config, "--cluster", "cpu", "--mem", "1T", f"run.dir={tmp_path / 'never'}")
        assert never.returncode == 2 and "SLURM refuses the job: " in never.stderr
        assert not Path(tmp_path / "never").exists()
    finally:
        slurm_cluster.run("scontrol", "update", f"NodeName={','.join(NODES)}", "State=RESUME")
    wait_until(lambda: state_of(slurm_cluster, job), lambda now: now != "PENDING", "the job to start")
