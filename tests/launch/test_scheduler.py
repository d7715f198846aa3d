"""What SLURM's commands are asked and with which environment, and how their answers are read."""

import math
import os
import re

import pytest

from caduceus.errors import UserError
from launch import scheduler
from launch.scheduler import JobState, OwnJob
from launch.submission import REPOSITORY

KEPT = {"SLURM_CONF": "/etc/other.conf", "SLURM_CLUSTERS": "green", "SLURM_JWT": "token", "HOME": "/home/me"}
DROPPED = {
    "SLURM_TIME_FORMAT": "relative",
    "SQUEUE_STATES": "CANCELLED",
    "SQUEUE_PARTITION": "other",
    "SQUEUE_USERS": "nobody",
    "SQUEUE_FORMAT": "%i",
    "SINFO_FORMAT": "%P",
    "SCONTROL_ALL": "1",
    "SCANCEL_NAME": "other",
    "SACCT_FORMAT": "JobID",
    "SALLOC_PARTITION": "other",
    "SBATCH_PARTITION": "other",
    "SBATCH_TIMELIMIT": "1",
    "SLURM_CPU_BIND": "none",  # would change what srun does in the job, to which sbatch hands it on
    "SLURM_MEM_PER_NODE": "1",  # of an interactive job that submits another one
    "SRUN_CPUS_PER_TASK": "1",
}


@pytest.fixture
def hostile(monkeypatch, fake_slurm, tmp_path):
    """SLURM's commands write down their environment, which has all that a user may have set."""
    for name, value in {**KEPT, **DROPPED}.items():
        monkeypatch.setenv(name, value)
    env = tmp_path / "env"
    for command in ("sinfo", "sbatch", "squeue", "sacct", "scontrol", "scancel"):
        fake_slurm.answer(command, f"/usr/bin/env > {env}.{command}")
    return lambda command: dict(
        line.split("=", 1) for line in (tmp_path / f"env.{command}").read_text().splitlines() if "=" in line
    )


ASKED = {
    "sinfo": scheduler.nodes,
    "sbatch": lambda: scheduler.objection("#!/bin/sh\n"),
    "squeue": lambda: scheduler.live_jobs(["7"]),
    "sacct": lambda: scheduler.end_of("7"),
    "scontrol": lambda: scheduler.requeue("7"),
    "scancel": lambda: scheduler.cancel(["7"]),
}


@pytest.mark.parametrize("command", ASKED)
def test_a_command_is_told_where_the_cluster_is_and_nothing_that_changes_its_answer(hostile, command):
    before = dict(os.environ)
    ASKED[command]()
    given = hostile(command)
    assert {name: given.get(name) for name in KEPT} == KEPT
    assert not DROPPED.keys() & given.keys()
    assert dict(os.environ) == before


def test_what_submitit_submits_does_not_get_them_either_and_they_are_named_once(
    hostile, launch, fake_slurm, small_config, capsys
):
    folder = fake_slurm.folder.parent
    fake_slurm.answer("sbatch", f"/usr/bin/env > {folder}/env.sbatch; echo Submitted batch job 7")
    fake_slurm.answer("sinfo", "echo 'main*|up|idle|4|64|250000|(null)|infinite'")
    assert launch("--config", small_config, "--cluster", "cpu", "run.dir=run") == 0
    assert not DROPPED.keys() & hostile("sbatch").keys()
    assert hostile("sbatch")["SLURM_CONF"] == KEPT["SLURM_CONF"]
    told = capsys.readouterr().err
    assert told.count("SBATCH_PARTITION, SBATCH_TIMELIMIT: set in the environment and not used") == 1
    assert os.environ["SBATCH_PARTITION"] == "other"


def test_no_other_module_knows_slurm_s_commands():
    commands = re.compile(r"""["'](sbatch|squeue|sinfo|scontrol|sacct|scancel)["' ]""")
    spoken = {"request.py": ["sbatch"], "capacity.py": ["sbatch"]}  # a preset's key; is there a SLURM at all
    for path in (REPOSITORY / "launch").glob("*.py"):
        if path.name != "scheduler.py":
            assert sorted(set(commands.findall(path.read_text()))) == spoken.get(path.name, []), path


def test_waiting_and_running_jobs_of_several_clusters_and_arrays(fake_slurm):
    rows = [
        "CLUSTER: green",
        "7|7_N/A|RUNNING|None",
        "12|11_3|PENDING|Nodes are down|so it waits",
        "9|9_N/A|RUNNING|None",
    ]
    fake_slurm.answer("squeue", "\n".join(f"echo '{row}'" for row in rows))
    assert scheduler.live_jobs(["7", "11_3", "8"]) == {
        "7": JobState("RUNNING", "None"),
        "11_3": JobState("PENDING", "Nodes are down|so it waits"),
    }
    assert scheduler.live_jobs([]) == {}


@pytest.mark.parametrize(
    ("left", "seconds"),
    [("1-02:03:04", 93784), ("5:06", 306), ("0:00", 0), ("INVALID", 0), ("UNLIMITED", math.inf), ("NOT_SET", math.inf)],
)
def test_the_own_job(fake_slurm, left, seconds):
    fake_slurm.shows(left=left, excluded="n[1-2]", reason="TimeLimit", restarts=2, preempted="2026-11-28T19:00:00")
    assert scheduler.own_job("7") == OwnJob("RUNNING", "TimeLimit", True, seconds, "n[1-2]", 2)
    fake_slurm.shows(left=left, excluded="(null)", preempted="N/A")
    assert scheduler.own_job("7") == OwnJob("RUNNING", "None", False, seconds, "", 0)


def test_a_controller_that_is_restarted_is_waited_for_and_a_refusal_is_not(fake_slurm, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    silent = "echo 'slurm_requeue error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    fake_slurm.answer("scontrol", f"[ -e {tmp_path}/asked.twice ] || {{ : > {tmp_path}/asked.twice; {silent}; }}")
    scheduler.requeue("7")
    assert len(fake_slurm.asked("scontrol")) == 2
    fake_slurm.answer("scontrol", "echo 'Requested operation is presently disabled for job 7' >&2; exit 1")
    with pytest.raises(UserError, match="scontrol requeue 7: Requested operation is presently disabled"):
        scheduler.requeue("7")
    assert len(fake_slurm.asked("scontrol")) == 3


@pytest.mark.parametrize("ask", [scheduler.nodes, lambda: scheduler.live_jobs(["7"]), lambda: scheduler.own_job("7")])
def test_without_the_command_slurm_is_silent(launch, ask):
    with pytest.raises(scheduler.SilentError, match=r"SLURM does not answer \(no s\w+ on this machine\)"):
        ask()


def test_an_ended_job_is_none_of_scancel_s(fake_slurm):
    fake_slurm.answer(
        "scancel", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1"
    )
    scheduler.cancel(["7"])
    fake_slurm.answer("scancel", "echo 'scancel: error: Access denied' >&2; exit 1")
    with pytest.raises(UserError, match="scancel 7: scancel: error: Access denied"):
        scheduler.cancel(["7"])
