"""The work of each task of a job: find the other ranks, then train with the run directory's configuration."""

import logging
import os
import signal
import sys
from dataclasses import dataclass, field

import submitit

from caduceus.config import Config
from caduceus.errors import ONE_LINE, Kind
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import ends_folder, recording_end
from caduceus.run.leaving import leaving
from caduceus.run.provenance import COMMAND, users_command
from launch import history, scheduler
from launch.history import submissions
from launch.node import check_node, node_defaults, own_slice

FIRST_PORT, PORTS = 10000, 20000  # below the ephemeral ports, which start at 32768
RESTART_STRIDE = 7919  # has no common factor with PORTS, and avoids the ports of the next jobs


@dataclass(frozen=True)
class TrainTask:
    """The callable that submitit pickles. It holds no state: the run directory tells where the run goes on."""

    run_dir: str
    command: str = field(default_factory=users_command)
    """The command with which the user submitted it."""

    def __call__(self) -> int:
        """Train, and return the trainer's exit status. The batch script decides what follows (launch/requeue.py)."""
        with leaving():
            return self._run()

    def _run(self) -> int:
        os.environ[COMMAND] = self.command
        end_on_signals()  # until the trainer listens, as there is nothing to save yet
        if "SLURM_STEP_NODELIST" in os.environ:  # the job may have spare nodes in addition
            os.environ["SLURM_JOB_NODELIST"] = os.environ["SLURM_STEP_NODELIST"]
            os.environ["SLURM_JOB_NUM_NODES"] = os.environ["SLURM_STEP_NUM_NODES"]
        job = submitit.JobEnvironment()
        on_slurm, restart = job.cluster == "slurm", history.this_restart()
        find_others(job, restart)
        run = RunDirectory.open(self.run_dir)
        step, starts = history.newest_step(run), len(run.starts())
        if job.global_rank == 0:
            if on_slurm:
                take_over(run, job.raw_job_id)
            nodes = os.environ["SLURM_JOB_NODELIST"] if on_slurm else job.hostname
            history.record_attempt(run, "start", job.job_id, restart, nodes=nodes, tasks=job.num_tasks, step=step)
        try:
            with recording_end(ends_folder(run.path, job.job_id, restart), job.global_rank):
                config = run.config()
                config.run.dir = self.run_dir
                check_node(os.environ, needs_gpus=on_slurm and config.run.device != "cpu")
                return train(config)
        except ONE_LINE as error:
            if error.kind is Kind.NODE and on_slurm:
                where = {"node": os.environ["SLURMD_NODENAME"], "nodes": os.environ["SLURM_JOB_NODELIST"]}
                history.record_attempt(run, "bad node", job.job_id, restart, **where, why=str(error))
            elif error.kind is Kind.USER and not _has_trained(run, starts, step):
                history.record_attempt(run, "refused", job.job_id, restart)
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(error.status)


def end_on_signals() -> None:
    """Let signals end this process: submitit's own handlers would ignore them, or requeue from one rank alone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


def find_others(job: submitit.JobEnvironment, restart: int = 0) -> None:
    """Set the environment variables of this task that torchrun would set, its share of the node, and the node's
    defaults.
    """
    first_host = job.hostnames[0] if job.cluster == "slurm" else "127.0.0.1"
    ranks = (job.global_rank, job.local_rank, job.num_tasks, job.num_tasks // job.num_nodes)
    os.environ.update(rendezvous(*ranks, first_host, int(job.raw_job_id), restart))
    os.environ.update(own_slice(os.environ, job.local_rank))
    for name, value in node_defaults(os.environ).items():
        os.environ.setdefault(name, value)


def train(config: Config) -> int:
    """Train in this process, with messages on stderr. Returns the trainer's exit status."""
    from caduceus.train import trainer
    from caduceus.train.__main__ import set_up_logging

    set_up_logging()
    logging.getLogger("submitit").propagate = False  # it prints its messages by itself
    return trainer.train(config)


def _has_trained(run: RunDirectory, starts: int, step: int) -> bool:
    """Whether a run has made a step since it had `starts` starts and a newest checkpoint at `step`."""
    rows = run.newest_metrics("step")  # rows of earlier starts after `step` are removed before a new start is recorded
    return len(run.starts()) > starts and bool(rows) and rows[-1]["step"] > step


def take_over(run: RunDirectory, job: str) -> None:
    """Shut out an earlier attempt: where a slurmd has died, its processes may still run without SLURM knowing."""
    holder = run.holder()
    if holder is None or holder.slurm_job is None:
        return
    if holder.slurm_job == job or _is_over(run, holder.slurm_job, job):
        if run.is_in_use():
            print(f"{run.path}: taken over from {holder}, which SLURM has lost", flush=True)
        run.shut_out_holder()


def _is_over(run: RunDirectory, earlier: str, job: str) -> bool:
    """Whether an earlier job has ended, as far as SLURM knows.

    In a container without squeue, it has ended if this job belongs to a submission of the run: a submission is refused
    while an earlier job of the run waits or runs, and a job of a chain waits for the one before.
    """
    try:
        return not scheduler.live_jobs([earlier])
    except scheduler.SilentError:
        jobs = [submitted for entry in submissions(run) for submitted in entry.jobs]
        return job in jobs and earlier in jobs[: jobs.index(job)]


def rendezvous(
    rank: int, local_rank: int, world: int, local_world: int, first_host: str, job_number: int, restart: int
) -> dict[str, str]:
    """The environment variables that torchrun would set.

    The port follows from the job and its restarts, so that jobs on one node do not meet, and processes left over from
    an earlier attempt do not join.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": first_host,
        "MASTER_PORT": str(FIRST_PORT + (job_number + RESTART_STRIDE * restart) % PORTS),
    }
