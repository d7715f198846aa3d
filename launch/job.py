"""What runs on each task of a job: find the other ranks, then train from the run directory's configuration."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import submitit

from caduceus.errors import UserError

FIRST_PORT, PORTS = 10000, 20000  # below the ephemeral range, which starts at 32768


@dataclass(frozen=True)
class TrainTask:
    """The callable that submitit pickles. It holds no state: where the run goes on is found in the run directory."""

    run_dir: str

    def __call__(self) -> int:
        """Train; returns the trainer's exit status. A run that stopped early is put back into SLURM's queue."""
        # Until the trainer listens, a signal ends the process: there is nothing to save yet, and submitit's own
        # handlers would swallow it or requeue from one rank alone.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        job = submitit.JobEnvironment()
        first_host = job.hostnames[0] if job.cluster == "slurm" else "127.0.0.1"
        os.environ.update(rendezvous(job.global_rank, job.local_rank, job.num_tasks, first_host, int(job.raw_job_id)))
        _set_defaults(node_defaults(os.environ))
        status = train_from(self.run_dir)
        from caduceus.train.preemption import EXIT_REQUEUE

        if status == EXIT_REQUEUE and job.cluster == "slurm" and job.global_rank == 0:
            subprocess.run(["scontrol", "requeue", job.raw_job_id], check=True)
        return status


def train_from(run_dir: str) -> int:
    """Train in this process by the configuration that the launcher left in the run directory.

    A user's mistake becomes one line and ends the process with status 2.
    """
    from caduceus.config import load_config
    from caduceus.train.__main__ import set_up_logging
    from caduceus.train.trainer import train

    try:
        set_up_logging()
        logging.getLogger("submitit").propagate = False  # it prints its messages by itself
        return train(load_config(Path(run_dir) / "config.yaml"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def rendezvous(rank: int, local_rank: int, world: int, first_host: str, job_number: int) -> dict[str, str]:
    """The variables that torchrun would set. The port follows from the job, so that jobs on one node do not meet."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": first_host,
        "MASTER_PORT": str(FIRST_PORT + job_number % PORTS),
    }


def node_defaults(environment: dict[str, str]) -> dict[str, str]:
    """Thread counts as the job asked for them, and compilers' caches on the node's own disk, not a shared one."""
    cache = Path(environment.get("SLURM_TMPDIR") or tempfile.gettempdir()) / f"caduceus-{os.getuid()}"
    defaults = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        defaults |= {"OMP_NUM_THREADS": cpus, "NUMBA_NUM_THREADS": cpus}
    return defaults


def _set_defaults(defaults: dict[str, str]) -> None:
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
