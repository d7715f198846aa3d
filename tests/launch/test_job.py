import os
from pathlib import Path

import pytest

from caduceus.config import Config, RunConfig
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from launch.history import attempts
from launch.job import FIRST_PORT, PORTS, TrainTask, rendezvous
from launch.node import node_defaults


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


@pytest.mark.parametrize(
    ("trained", "mistake", "noted"),
    [
        (None, "parallel.strategy: single runs on one process", [True]),
        (False, "ops.backend: 'triton' needs an NVIDIA GPU", [True]),
        (True, "train.max_skipped_steps: loss is not finite", []),
        (None, "another rank failed; its own message says why", []),
        (None, "rank 3 on n1: /dev/shm has 64 MB", []),
    ],
)
def test_a_rank_s_own_mistake_before_the_first_step_is_noted(task, monkeypatch, trained, mistake, noted):
    run = RunDirectory(task.run_dir)

    def train(config: Config) -> int:
        if trained is not None:
            run.write_provenance({})
            run.metrics_path.write_text('{"step": 1}\n' * trained)
        raise UserError(mistake)

    monkeypatch.setattr("launch.job.train", train)
    with pytest.raises(SystemExit, match="2"):
        task()
    assert [attempt.refused for attempt in attempts(run)] == noted


def port(job: int, restart: int) -> int:
    return int(rendezvous(0, 0, 2, 1, "a", job, restart)["MASTER_PORT"])


def test_ports_keep_clear_of_the_ephemeral_range_of_neighbouring_jobs_and_of_earlier_attempts():
    for ports in ([port(job, 0) for job in range(PORTS)], [port(7, restart) for restart in range(PORTS)]):
        assert len(set(ports)) == PORTS
        assert min(ports) == FIRST_PORT and max(ports) < 32768


def test_threads_follow_the_request_and_caches_lie_on_the_node():
    defaults = node_defaults({"SLURM_CPUS_PER_TASK": "12", "SLURM_TMPDIR": "/local/77"})
    assert defaults["OMP_NUM_THREADS"] == defaults["NUMBA_NUM_THREADS"] == "12"
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path("/local/77") in Path(defaults[name]).parents
    assert "OMP_NUM_THREADS" not in node_defaults({})
