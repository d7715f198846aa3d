"""launch/slurm.py --check: the doctor (caduceus.doctor) on the nodes that a job would get.

Each task of the step that srun starts runs: python -m launch.check FOLDER DEVICE
"""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit

from caduceus.errors import UserError, run_command
from launch import scheduler
from launch.job import find_others, rendezvous
from launch.request import JobRequest, sbatch_parameters
from launch.submission import REPOSITORY

_MINUTES = 15
_ONLY_OF_SBATCH = ("requeue", "no-requeue", "mail-type", "mail-user", "comment")


def check(request: JobRequest, folder: Path, device: str) -> int:
    """Run the doctor on as many nodes, processes and GPUs as the request asks for, and return its exit status.

    Like srun, it waits for the nodes; then it prints the page. Raises `UserError` where SLURM refuses.
    """
    request = replace(request, nodes=request.allocated_nodes, spare=0)
    doctor = [sys.executable, "-m", "caduceus.doctor", "--folder", str(folder), "--device", device]
    environment = os.environ | request.env | {"PYTHONPATH": _pythonpath()}
    if request.executor == "debug":
        return subprocess.run(doctor, env=environment).returncode
    if request.executor == "local":
        return _check_here(doctor, environment, request.world)
    return scheduler.run_step(step_options(request), _script(request, folder, device))


def step_options(request: JobRequest) -> list[str]:
    """The request as options of srun, which allocates the nodes by itself, for at most a quarter of an hour."""
    parameters = sbatch_parameters(request, "caduceus-check")
    further: dict[str, Any] = parameters.pop("additional_parameters")
    names = ("job_name", "nodes", "ntasks_per_node", "cpus_per_task", "mem")
    options = {name.replace("_", "-"): parameters[name] for name in names if name in parameters}
    options |= {"time": min(_MINUTES, request.minutes)}
    options |= {name: value for name, value in further.items() if name not in _ONLY_OF_SBATCH}
    written = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    return [*written, *parameters["srun_args"]]


def _script(request: JobRequest, folder: Path, device: str) -> str:
    """The script that bash runs in each task."""
    python = request.python or shlex.quote(sys.executable)
    lines = [*sbatch_parameters(request, "caduceus-check")["setup"]]
    lines.append(f"export PYTHONPATH={shlex.quote(_pythonpath())}")
    lines.append(f"exec {python} -m launch.check {shlex.quote(str(folder.absolute()))} {device}")
    return "\n".join(lines)


def _pythonpath() -> str:
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def _check_here(doctor: list[str], environment: dict[str, str], world: int) -> int:
    """Run the doctor in `world` processes on this machine."""
    ranks = []
    for rank in range(world):
        place = rendezvous(rank, rank, world, world, "127.0.0.1", os.getpid(), 0)
        ranks.append(subprocess.Popen(doctor, env=environment | place))
    return max(rank.wait() for rank in ranks)


def main() -> int:
    """One task of the step: find the other tasks, and run as a rank of the doctor."""
    from caduceus.doctor.__main__ import examine

    if len(sys.argv) != 3 or "SLURM_JOB_ID" not in os.environ:
        raise UserError("launch.check: only launch/slurm.py --check starts this")
    os.environ["SUBMITIT_EXECUTOR"] = "slurm"
    find_others(submitit.JobEnvironment())
    return examine(Path(sys.argv[1]), sys.argv[2])


if __name__ == "__main__":
    run_command(main)
