import json
import os
import pickle
import sys

import pytest

from caduceus.config import Config, RunConfig
from caduceus.errors import Kind, NodeError, PeerError, RetryError, UserError
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import ends_folder, read_ends
from launch.history import Submission, attempts, record_submission
from launch.job import FIRST_PORT, PORTS, TrainTask, rendezvous, take_over


def test_rendezvous_of_64_nodes_of_8():
    ranks = {"rank": 511, "local_rank": 7, "world": 512, "local_world": 8}
    last = rendezvous(**ranks, first_host="gpu001", job_number=4_294_901_759, restart=0)
    assert last == {
        "RANK": "511",
        "LOCAL_RANK": "7",
        "WORLD_SIZE": "512",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu001",
        "MASTER_PORT": "11759",
    }


@pytest.fixture
def task(monkeypatch, tmp_path) -> TrainTask:
    """The sixth of eight tasks on two nodes; it changes neither this process's environment nor its signal handlers."""
    slurm = {"JOB_ID": "7", "PROCID": "5", "LOCALID": "1", "NTASKS": "8", "JOB_NUM_NODES": "2", "NODEID": "1"}
    environment = {f"SLURM_{name}": value for name, value in (slurm | {"JOB_NODELIST": "n[0-1]"}).items()}
    monkeypatch.setattr(os, "environ", dict(os.environ) | environment | {"SUBMITIT_EXECUTOR": "slurm"})
    monkeypatch.setattr("submitit.JobEnvironment.hostnames", ["n0", "n1"])
    monkeypatch.setattr("launch.job.check_node", lambda *_, **__: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    RunDirectory.create_or_resume(Config(run=RunConfig(dir=str(tmp_path), name="run", device="cpu"))).release()
    return TrainTask(str(tmp_path))


def test_each_task_knows_how_many_share_its_node(task, monkeypatch):
    monkeypatch.setattr("launch.job.train", lambda config: int(os.environ["LOCAL_WORLD_SIZE"]))
    assert task() == 4


def test_a_start_is_told_by_the_command_that_submitted_it(task, monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch/slurm.py", "--nodes", "2"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    sent = pickle.dumps(TrainTask(task.run_dir))
    monkeypatch.setattr("sys.argv", ["submitit/core/_submit.py", "logs"])
    monkeypatch.setattr("launch.job.train", lambda config: RunDirectory(task.run_dir).write_provenance({}) or 0)
    assert pickle.loads(sent)() == 0
    assert RunDirectory(task.run_dir).starts()[0]["command"] == "python launch/slurm.py --nodes 2"


@pytest.mark.parametrize(
    ("trained", "error", "status", "noted"),
    [
        (None, UserError("parallel.strategy: single runs on one process"), 2, [True]),
        (False, UserError("ops.backend: 'triton' needs an NVIDIA GPU"), 2, [True]),
        (True, UserError("train.max_skipped_steps: loss is not finite"), 2, []),
        (None, UserError("another rank failed, says a message, and is not believed"), 2, [True]),
        (None, PeerError("parallel.strategy: on rank 1", 1, Kind.USER), 2, []),
        (None, PeerError("rank 3 on n1: /dev/shm has 64 MB", 3, Kind.NODE), 2, []),
        (None, PeerError("data.path: rank 1 failed: RuntimeError: a worker was killed", 1, Kind.CRASH), 1, []),
        (None, PeerError("lost contact"), 1, []),
        (None, RetryError("run.dir: another process is training in run"), 2, []),
    ],
)
def test_a_rank_s_own_mistake_before_the_first_step_is_noted(task, monkeypatch, trained, error, status, noted):
    run = RunDirectory(task.run_dir)

    def train(config: Config) -> int:
        if trained is not None:
            run.write_provenance({})
            run.metrics_path.write_text('{"step": 1}\n' * trained)
        raise error

    monkeypatch.setattr("launch.job.train", train)
    with pytest.raises(SystemExit) as ended:
        task()
    assert ended.value.code == status
    assert [attempt.refused for attempt in attempts(run)] == noted
    end = read_ends(ends_folder(run.path, "7", 0))[5]
    assert (end.kind, end.message) == (error.kind, str(error))


def test_a_crash_and_a_bad_node_leave_their_ends(task, monkeypatch):
    run = RunDirectory(task.run_dir)
    monkeypatch.setattr("launch.job.train", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task()
    assert read_ends(ends_folder(run.path, "7", 0))[5].kind is Kind.CRASH
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr("launch.job.check_node", blind_node)
    with pytest.raises(SystemExit, match="2"):
        task()
    assert read_ends(ends_folder(run.path, "7", 1))[5].kind is Kind.NODE
    assert [(attempt.restart, attempt.bad_nodes) for attempt in attempts(run)] == [(1, ["n1"])]


def blind_node(*_: object, **__: object) -> None:
    raise NodeError("n1: torch sees 3 of the 4 GPUs")


def port(job: int, restart: int) -> int:
    return int(rendezvous(0, 0, 2, 1, "a", job, restart)["MASTER_PORT"])


def test_ports_keep_clear_of_the_ephemeral_range_of_neighbouring_jobs_and_of_earlier_attempts():
    for ports in ([port(job, 0) for job in range(PORTS)], [port(7, restart) for restart in range(PORTS)]):
        assert len(set(ports)) == PORTS
        assert min(ports) == FIRST_PORT and max(ports) < 32768


@pytest.mark.parametrize(
    ("holder", "squeue", "over"),
    [
        ("7", None, True),  # this very job, before it was requeued
        ("5", None, True),  # submitted before: this job could not have been while it was alive
        ("6", None, True),  # the job before it in a chain
        ("9", None, False),  # nobody knows
        ("8", None, False),  # a later job of the chain
        ("9", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("5", "echo '5|5_N/A|RUNNING|None'", False),  # squeue knows better
    ],
)
def test_an_earlier_job_is_over_also_where_squeue_is_not_to_be_asked(fake_slurm, tmp_path, holder, squeue, over):
    run = RunDirectory.create_or_resume(Config(run=RunConfig(dir=str(tmp_path / "run"), name="run", device="cpu")))
    run.release()
    for jobs in (["5"], ["6", "7", "8"]):
        record_submission(run, Submission(run.path, jobs, "slurm", run.logs_path, {}))
    if squeue is None:
        (fake_slurm.folder / "squeue").unlink()
    else:
        fake_slurm.answer("squeue", squeue)
    before = (run.path / ".lock").stat().st_ino
    claim = {"host": "elsewhere", "pid": 1, "slurm_job": holder, "since": 0.0}
    (run.path / ".lock").write_text(json.dumps(claim))
    take_over(run, "7")
    assert ((run.path / ".lock").stat().st_ino != before) is over
