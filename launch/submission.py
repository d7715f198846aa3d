"""Submits runs to SLURM through submitit."""

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import submitit

from caduceus.errors import UserError
from caduceus.files import dump_json, replacing_directory, write_atomically
from caduceus.run.directory import RunDirectory
from caduceus.run.provenance import CODE_VERSION, code_version
from launch import scheduler
from launch.capacity import waiting_note
from launch.history import RESTART, Submission, record_submission
from launch.job import TrainTask
from launch.request import JobRequest, sbatch_parameters

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("caduceus", "data_prep", "launch")


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor, which can also be made without SLURM, for a dry run; a submission checks for SLURM first."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        """The batch script."""
        # submitit has no public way to get the text without submitting it.
        return self._make_submission_file_text(self._submitit_command_str, "")


def submit(request: JobRequest, run: RunDirectory, job_name: str) -> list[str]:
    """Submit a run to SLURM, as one job or as a chain. Returns the jobs' ids.

    Raises `UserError` with SLURM's reason where it refuses.
    """
    executor = run_executor(request, run.path.absolute(), job_name)
    refuse_what_slurm_refuses(executor, request)
    snapshot_code(run.path)
    task = TrainTask(str(run.path.absolute()))
    jobs: list[str] = []
    try:
        for _ in range(request.chain):
            if jobs:
                executor.update_parameters(dependency=f"afterany:{jobs[-1]}")
            jobs.append(submitted(lambda: executor.submit(task)).job_id)
    finally:
        if jobs:
            record_submission(run, _submission(request, run, jobs, run.path / "logs"))
    return jobs


def submit_array(request: JobRequest, folder: Path, runs: Sequence[RunDirectory], job_name: str) -> list[str]:
    """Submit several runs as one job array, with code and logs in `folder`. Returns the ids of the array's jobs."""
    executor = run_executor(request, folder.absolute(), job_name, array=True)
    refuse_what_slurm_refuses(executor, request)
    snapshot_code(folder)
    write_atomically(folder / "runs.txt", "".join(f"{run.path.absolute()}\n" for run in runs).encode())
    tasks = [TrainTask(str(run.path.absolute())) for run in runs]
    jobs = [job.job_id for job in submitted(lambda: executor.submit_array(tasks))]
    for run, job in zip(runs, jobs, strict=True):
        record_submission(run, _submission(request, run, [job], folder / "logs"))
    return jobs


def run_executor(request: JobRequest, folder: Path, job_name: str, array: bool = False) -> SlurmExecutor:
    """The executor for the run in `folder`, or for the runs in folder/runs.txt, whose jobs requeue themselves."""
    executor = SlurmExecutor(folder / "logs", python=request.python)
    parameters = sbatch_parameters(request, job_name)
    listed = '"$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" ' + shlex.quote(str(folder / "runs.txt")) + ')"'
    settle = f'{shlex.quote(sys.executable)} -m launch.requeue "$RUN"'
    parameters["setup"] += [
        pythonpath(folder),
        f"RUN={listed if array else shlex.quote(str(folder))}",
        '[ -e "$RUN/STOP" ] && exit',
        f"trap '{settle} TERM' TERM  # the time may be up while the processes still save",
        *_starts(request),
    ]
    parameters["teardown"] = [
        "status=$?",
        "trap '' TERM",
        f"{settle} $status",
    ]
    executor.update_parameters(**parameters)
    return executor


def _starts(request: JobRequest) -> list[str]:
    """Shell lines that start the processes, and again with a spare node where a node is lost (launch/spare.py)."""
    waiting = '{ command srun "$@" & while wait $!; s=$?; kill -0 $! 2>/dev/null; do :; done; return $s; }'
    if not request.spare:
        return [f"srun() {waiting}  # traps need wait"]
    python = shlex.quote(sys.executable)
    return [
        f"export {RESTART}=$((${{SLURM_RESTART_COUNT:-0}} * {request.spare + 1}))",
        f"run_step() {waiting}  # traps need wait",
        "srun() {",
        '  until run_step $again "$@"; do',
        f'    again=$({python} -m launch.spare "$RUN" $s) || return $s',
        f"    {RESTART}=$(({RESTART} + 1))",
        "  done",
        "}",
    ]


def pythonpath(folder: Path) -> str:
    """The shell line with which a job imports the submitted code."""
    return f"export PYTHONPATH={shlex.quote(str(folder / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}}"


def refuse_what_slurm_refuses(executor: SlurmExecutor, request: JobRequest) -> None:
    """Raise `UserError` where SLURM would refuse the job; print a note where the job will wait for nodes to
    come back.
    """
    note_unused_settings()
    if objection := scheduler.objection(executor.script()):
        note = waiting_note(request)
        if note is None:
            raise UserError(f"SLURM refuses the job: {objection}")
        print(f"note:          {note}", flush=True)


def note_unused_settings() -> None:
    """Name, on stderr, the environment variables of sbatch that the request does not use."""
    if names := scheduler.unused_settings():
        print(
            f"note: {', '.join(names)}: set in the environment and not used; a preset, or options such as "
            "--partition, --time and --sbatch KEY=VALUE, say what a job asks for",
            file=sys.stderr,
        )


def submitted(submit: Callable[[], Any]) -> Any:
    """The result of `submit()`. Raises `UserError` where sbatch refuses."""
    try:
        with scheduler.clean_environment():
            return submit()
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch: {' '.join(str(error).split())}") from None
    except submitit.core.utils.FailedSubmissionError as error:
        told = " ".join(str(error).split())
        raise UserError(f"sbatch: {told}; check with squeue whether it has accepted the job nevertheless") from None


def snapshot_code(folder: Path) -> Path:
    """Copy the code to folder/code, so that a job that starts later, or again, runs the submitted code.

    Compiled CPU kernels in __pycache__ are copied too, as compiling them again takes a minute.
    """
    code = folder.absolute() / "code"
    with replacing_directory(code) as new:
        for package in PACKAGES:
            shutil.copytree(REPOSITORY / package, new / package, ignore=shutil.ignore_patterns("*.tmp*"))
        (new / CODE_VERSION).write_bytes(dump_json(code_version()))
    return code


def _submission(request: JobRequest, run: RunDirectory, jobs: list[str], logs: Path) -> Submission:
    asked = vars(request) | {"requeue": request.requeues}
    return Submission(run.path.absolute(), jobs, request.executor, logs.absolute(), asked)
