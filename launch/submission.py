"""Handing runs to SLURM through submitit, and what is left in a run directory of that."""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from caduceus.errors import UserError
from caduceus.files import dump_json, replacing_directory, write_atomically
from caduceus.run.directory import RunDirectory
from caduceus.run.provenance import CODE_VERSION, code_version, provenance
from launch.cluster import Cluster, last_line, sbatch_parameters, test_submission
from launch.job import TrainTask

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("caduceus", "data_prep", "launch")


class SlurmSilentError(UserError):
    """SLURM does not tell what has become of its jobs."""


@dataclass(frozen=True)
class Submission:
    """A run handed over once: its jobs (several in a chain), where their logs are, and what was asked for."""

    run: Path
    jobs: list[str]
    executor: str
    logs: Path
    request: dict[str, Any]


class SlurmExecutor(submitit.SlurmExecutor):
    """Can be made without SLURM, for a dry run; a real submission looks for SLURM first."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        """The text that sbatch gets."""
        # submitit has no public way to the text without submitting it.
        return self._make_submission_file_text(self._submitit_command_str, "")


def submit(cluster: Cluster, run: RunDirectory, job_name: str) -> list[str]:
    """Submit a run to SLURM, as one job or as a chain; returns the jobs' ids.

    Raises `UserError` with SLURM's reason where it refuses.
    """
    executor = run_executor(cluster, run.path.absolute(), job_name)
    refuse_what_slurm_refuses(executor)
    snapshot_code(run.path)
    task = TrainTask(str(run.path.absolute()))
    jobs: list[str] = []
    try:
        for _ in range(cluster.chain):
            if jobs:
                executor.update_parameters(dependency=f"afterany:{jobs[-1]}")
            jobs.append(submitted(lambda: executor.submit(task)).job_id)
    finally:
        if jobs:
            record(run, _submission(cluster, run, jobs, run.path / "logs"))
    return jobs


def submit_array(cluster: Cluster, folder: Path, runs: Sequence[RunDirectory], job_name: str) -> list[str]:
    """Submit several runs as one job array, with code and logs in `folder`; returns the ids of the array's jobs."""
    executor = run_executor(cluster, folder.absolute(), job_name, array=True)
    refuse_what_slurm_refuses(executor)
    snapshot_code(folder)
    write_atomically(folder / "runs.txt", "".join(f"{run.path.absolute()}\n" for run in runs).encode())
    tasks = [TrainTask(str(run.path.absolute())) for run in runs]
    jobs = [job.job_id for job in submitted(lambda: executor.submit_array(tasks))]
    for run, job in zip(runs, jobs, strict=True):
        record(run, _submission(cluster, run, [job], folder / "logs"))
    return jobs


def run_executor(cluster: Cluster, folder: Path, job_name: str, array: bool = False) -> SlurmExecutor:
    """For a run in `folder`, or for the runs that folder/runs.txt lists: their jobs look after themselves."""
    executor = SlurmExecutor(folder / "logs", python=cluster.python)
    parameters = sbatch_parameters(cluster, job_name)
    listed = '"$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" ' + shlex.quote(str(folder / "runs.txt")) + ')"'
    settle = f'{shlex.quote(sys.executable)} -m launch.requeue "$RUN"'
    parameters["setup"] += [
        pythonpath(folder),
        f"RUN={listed if array else shlex.quote(str(folder))}",
        '[ -e "$RUN/STOP" ] && exit',
        f"trap '{settle} TERM' TERM  # the time may be up while the processes still save",
        'srun() { command srun "$@" & while wait $!; s=$?; kill -0 $! 2>/dev/null; do :; done; return $s; }'
        "  # traps need wait",
    ]
    parameters["teardown"] = [
        "status=$?",
        "trap '' TERM",
        f"{settle} $status",
    ]
    executor.update_parameters(**parameters)
    return executor


def pythonpath(folder: Path) -> str:
    """The shell line that lets a job import the code that was submitted."""
    return f"export PYTHONPATH={shlex.quote(str(folder / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}}"


def refuse_what_slurm_refuses(executor: SlurmExecutor) -> None:
    """Raise `UserError` where SLURM would not take the job."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(executor.script())
        file.flush()
        if complaint := test_submission(Path(file.name)):
            raise UserError(complaint)


def submitted(submit: Callable[[], Any]) -> Any:
    """What a submission returns; a refusal by sbatch is a `UserError`."""
    try:
        return submit()
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch: {' '.join(str(error).split())}") from None


def live_jobs(run: RunDirectory) -> dict[str, tuple[str, str]]:
    """{job: (state, reason)} of the SLURM jobs that wait for, or train in, a run directory.

    Raises `SlurmSilentError` where there may be such jobs and SLURM does not tell.
    """
    jobs = [job for entry in submissions(run) if entry.executor == "slurm" for job in entry.jobs]
    if not jobs:
        return {}
    if shutil.which("squeue") is None:
        raise SlurmSilentError("SLURM does not answer (no squeue on this machine)")
    columns = "%A|%F_%K|%T|%r"
    numbers = ",".join(sorted({job.split("_")[0] for job in jobs}))
    command = ["squeue", "--noheader", "--array", f"--jobs={numbers}", f"--format={columns}"]
    result = subprocess.run(command, capture_output=True, text=True)
    # squeue fails for a job that SLURM has forgotten, which is then not alive.
    if result.returncode and "Invalid job id" not in result.stderr:
        raise SlurmSilentError(f"SLURM does not answer ({last_line(result.stderr)})")
    found = {}
    for line in result.stdout.splitlines():
        number, of_array, state, reason = line.split("|")
        job = of_array if of_array in jobs else number
        if job in jobs:
            found[job] = (state, reason)
    return found


def submissions(run: RunDirectory) -> list[Submission]:
    """Every submission of a run, oldest first."""
    path = run.path / "submissions.json"
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        return [Submission(run.path, row["jobs"], row["executor"], Path(row["logs"]), row["request"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); mend it, or move it "
            "away where none of its jobs is alive"
        ) from None


def record(run: RunDirectory, submission: Submission) -> None:
    """Add a submission to RUN/submissions.json, with what was submitted by whom and from where."""
    path = run.path / "submissions.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    entry = {
        "jobs": submission.jobs,
        "executor": submission.executor,
        "logs": str(submission.logs),
        "request": submission.request,
        **provenance(),
    }
    write_atomically(path, dump_json([*rows, entry]))


def snapshot_code(folder: Path) -> Path:
    """Copy the code to folder/code, so that a job which starts later, or again, runs what was submitted.

    Compiled CPU kernels, in __pycache__, are copied with it: compiling them again takes a minute.
    """
    code = folder.absolute() / "code"
    with replacing_directory(code) as new:
        for package in PACKAGES:
            shutil.copytree(REPOSITORY / package, new / package, ignore=shutil.ignore_patterns("*.tmp*"))
        (new / CODE_VERSION).write_bytes(dump_json(code_version()))
    return code


def _submission(cluster: Cluster, run: RunDirectory, jobs: list[str], logs: Path) -> Submission:
    request = vars(cluster) | {"requeue": cluster.requeues}
    return Submission(run.path.absolute(), jobs, cluster.executor, logs.absolute(), request)
