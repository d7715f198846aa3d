from pathlib import Path

from launch.job import FIRST_PORT, PORTS, rendezvous
from launch.node import node_defaults


def test_rendezvous_of_64_nodes_of_8():
    last = rendezvous(rank=511, local_rank=7, world=512, first_host="gpu001", job_number=4_294_901_759, restart=0)
    assert last == {
        "RANK": "511",
        "LOCAL_RANK": "7",
        "WORLD_SIZE": "512",
        "MASTER_ADDR": "gpu001",
        "MASTER_PORT": "11759",
    }


def port(job: int, restart: int) -> int:
    return int(rendezvous(0, 0, 2, "a", job, restart)["MASTER_PORT"])


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
