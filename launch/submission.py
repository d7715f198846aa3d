"""Handing a run to SLURM or to this machine through submitit, and what is left in the run directory of that."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit

from caduceus.config import Config, WandbConfig
from caduceus.data.shards import dump_json, write_atomically
from caduceus.errors import UserError
from caduceus.run_directory import RunDirectory, provenance
from launch.cluster import Cluster, sbatch_parameters, test_submission
from launch.job import TrainTask

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("caduceus", "data_prep", "launch")
LIVE_STATES = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING"


class _SlurmExecutor(submitit.SlurmExecutor):
    """Can be made without SLURM, for a dry run; a real submission looks for SLURM first."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def submit(config: Config, cluster: Cluster, run: RunDirectory) -> None:
    """Submit to SLURM and say how to follow the run. Raises `UserError` with SLURM's reason where it refuses."""
    script = batch_script(config, cluster)
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        if complaint := test_submission(Path(file.name)):
            raise UserError(complaint)
    snapshot_code(run)
    try:
        job = _slurm_executor(config, cluster).submit(TrainTask(str(run.path.absolute())))
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch: {' '.join(str(error).split())}") from None
    _record(run, cluster, job.job_id)
    print(
        f"job:           {job.job_id}\nlog:           {job.paths.stdout}\nW&B:           {_wandb_place(config.wandb)}"
    )
    print(f"next:          squeue -j {job.job_id}   tail -F {job.paths.stdout}   scancel {job.job_id}")


def run_here(cluster: Cluster, run: RunDirectory) -> int:
    """Run as a job of this machine, show the first rank's output until it ends, and return its exit status."""
    if cluster.setup or cluster.srun or cluster.python:
        raise UserError("setup, srun, python: a local job runs in this shell's environment, with this Python")
    code = snapshot_code(run)
    executor = submitit.LocalExecutor(run.path.absolute() / "logs")
    executor.update_parameters(
        tasks_per_node=cluster.processes_per_node,
        gpus_per_node=cluster.gpus_per_node,
        timeout_min=cluster.minutes,
        signal_delay_s=cluster.signal_seconds,
        stderr_to_stdout=True,
    )
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    with submitit.helpers.environment_variables(**cluster.env, PYTHONPATH=path), _ctrl_c_ignored():
        job = executor.submit(TrainTask(str(run.path.absolute())))
    _record(run, cluster, job.job_id)
    print(f"log:           {job.paths.stdout}", flush=True)
    last = ""
    for last in _lines_until_done(job):
        print(last, end="", flush=True)
    if job.exception() is None:
        return max(job.results())
    return 2 if last.startswith("error: ") else 1


def batch_script(config: Config, cluster: Cluster) -> str:
    """The text that sbatch gets."""
    executor = _slurm_executor(config, cluster)
    # submitit has no public way to the text without submitting it.
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def live_job(run: RunDirectory) -> str | None:
    """The SLURM job that waits for, or trains in, a run directory; None where there is none."""
    jobs = [entry["job"] for entry in submissions(run) if entry["executor"] == "slurm"]
    if not jobs:
        return None
    command = ["squeue", "--noheader", f"--jobs={','.join(jobs)}", f"--states={LIVE_STATES}", "--format=%i"]
    # squeue fails for a job that SLURM has forgotten, which is then not alive.
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return found[0] if found else None


def submissions(run: RunDirectory) -> list[dict[str, Any]]:
    """Every submission of a run, oldest first: time, executor, job, request, code version."""
    path = run.path / "submissions.json"
    return json.loads(path.read_text()) if path.exists() else []


def snapshot_code(run: RunDirectory) -> Path:
    """Copy the code to RUN/code, so that a job which starts later, or again, runs what was submitted.

    Compiled CPU kernels, in __pycache__, are copied with it: compiling them again takes a minute.
    """
    code, new = run.path.absolute() / "code", run.path.absolute() / "code.new"
    shutil.rmtree(new, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, new / package, ignore=shutil.ignore_patterns("*.tmp*"))
    shutil.rmtree(code, ignore_errors=True)
    new.rename(code)
    return code


def _slurm_executor(config: Config, cluster: Cluster) -> submitit.SlurmExecutor:
    run_path = Path(config.run.dir).absolute()
    executor = _SlurmExecutor(run_path / "logs", python=cluster.python)
    parameters = sbatch_parameters(cluster, config.run.name)
    parameters["setup"].append(f"export PYTHONPATH={shlex.quote(str(run_path / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}}")
    executor.update_parameters(**parameters)
    return executor


def _record(run: RunDirectory, cluster: Cluster, job: str) -> None:
    entry = {"job": job, "executor": cluster.executor, "request": vars(cluster), **provenance()}
    write_atomically(run.path / "submissions.json", dump_json([*submissions(run), entry]))


def _wandb_place(wandb: WandbConfig) -> str:
    if wandb.mode in ("offline", "disabled"):
        return wandb.mode
    project = "/".join(filter(None, [wandb.entity, wandb.project]))
    return f"project {project}; the log has the link of the run"


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """What starts meanwhile is deaf to Ctrl-C: submitit's controller would kill its tasks, who want to save first."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lines_until_done(job: submitit.Job[int]) -> Iterator[str]:
    """Lines of the first rank's log as they come. Ctrl-C reaches the ranks by itself; here it is waited for."""
    while not job.paths.stdout.exists() and not job.done():
        time.sleep(0.1)
    with job.paths.stdout.open() as log:
        while True:
            try:
                done = job.done()
                yield from log
                if done:
                    return
                time.sleep(0.2)
            except KeyboardInterrupt:
                print("stopping after this step, with a checkpoint", flush=True)
