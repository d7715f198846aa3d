"""Starts runs as jobs of this machine, through submitit's local executor."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.local.local import Controller, LocalExecutor, LocalJob

from caduceus.errors import Kind, UserError
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import ends_folder, first_cause, read_ends
from launch import history
from launch.history import Submission, record_submission
from launch.job import TrainTask
from launch.logs import follow, last_error, log_path
from launch.node import visible_gpus
from launch.request import JobRequest
from launch.submission import snapshot_code

_LONGEST_MINUTES = 60 * 24 * 3650
"""The time limit, in minutes, of a job that asks for none."""
_CANCELLED = 143
"""Exit status of a controller that was told to kill its job."""
GRACE_SECONDS = 10
"""Seconds that the other ranks may take to end by themselves after one has failed."""


def run_here(request: JobRequest, run: RunDirectory) -> int:
    """Start a run as a job of this machine, show the first rank's output until it ends, and return its exit status."""
    executor, job = started_here(request, run.path, TrainTask(str(run.path.absolute())))
    logs = executor.folder
    record_submission(run, Submission(run.path.absolute(), [job.job_id], request.executor, logs, vars(request)))
    ended = shown(executor, job, "stopping after this step, with a checkpoint")
    failed = ended != 0
    cause = first_cause(read_ends(ends_folder(run.path, job.job_id, 0)))
    mistaken = cause is not None and cause.kind in (Kind.USER, Kind.NODE, Kind.RETRY)
    status = (2 if mistaken else 1) if failed else max(job.results())
    error = last_error(run, logs, job.job_id, 0) if failed else None
    reason = history.Reason.FAILED if failed else history.Reason.STOPPED if status else history.Reason.COMPLETE
    if ended == _CANCELLED:
        reason, error = history.Reason.CANCELLED, None
    history.record_attempt(
        run, "end", job.job_id, 0, reason=reason, step=history.newest_step(run), error=error, status=status
    )
    return status


def started_here(request: JobRequest, folder: Path, task: Callable[[], Any]) -> "tuple[_Executor, LocalJob]":
    """Start a task's processes on this machine, with a copy of the code and their logs in `folder`."""
    if request.setup or request.srun or request.python:
        raise UserError("setup, srun, python: a local job has this shell's environment and this Python; leave them out")
    given = visible_gpus(os.environ)
    if given and len(given) < request.gpus_per_node:
        raise UserError(
            f"gpus_per_node: {request.gpus_per_node} asked for, but CUDA_VISIBLE_DEVICES gives this shell {len(given)}"
        )
    code = snapshot_code(folder)
    executor = _Executor(folder.absolute() / "logs")
    executor.update_parameters(
        tasks_per_node=request.processes_per_node,
        gpus_per_node=request.gpus_per_node,
        timeout_min=min(request.minutes, _LONGEST_MINUTES),
        signal_delay_s=request.signal_seconds,
        stderr_to_stdout=True,
    )
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    with submitit.helpers.environment_variables(**request.env, PYTHONPATH=path), _ctrl_c_ignored():
        return executor, executor.submit(task)


def shown(executor: "_Executor", job: LocalJob, on_ctrl_c: str) -> int:
    """Show the first rank's output until the job ends. Returns 0 where all its processes succeeded."""
    log = log_path(executor.folder, job.job_id)
    print(f"log:           {log}", flush=True)
    for line in _through_ctrl_c(follow(log, job.done), on_ctrl_c):
        print(line, end="", flush=True)
    return executor.controller.wait()


class _Executor(LocalExecutor):
    """Its jobs have a `_Controller`; attribute `controller`: its process, which exits with 0 where all tasks did."""

    def _submit_command(self, command: str) -> LocalJob:
        gpus = self.parameters["gpus_per_node"]
        tasks = self.parameters["tasks_per_node"]
        environment = {
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * self.parameters["timeout_min"]),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(self.parameters["signal_delay_s"]),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
        }
        if gpus:  # otherwise the job has all GPUs that this shell sees
            given = visible_gpus(os.environ) or [str(number) for number in range(gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(given[:gpus])
        controller = [sys.executable, "-m", "launch.local", str(self.folder)]
        self.controller = subprocess.Popen(controller, env=os.environ | environment)
        job_id = str(self.controller.pid)
        return LocalJob(folder=self.folder, job_id=job_id, process=self.controller, tasks=list(range(tasks)))


class _Controller(Controller):
    """Ends the whole job when one of its processes has failed, as srun's --kill-on-bad-exit does. SIGTERM kills the
    job.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.succeeded = self.cancelled = False
        signal.signal(signal.SIGTERM, self._kill)

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Wait until all processes have ended, the time is up, or one has failed and the others had time to end."""
        started = time.monotonic()
        told, failed = False, None
        while None in (statuses := [task.poll() for task in self.tasks]):
            now = time.monotonic()
            if failed is None and any(statuses):
                failed = now
                rank, status = next((rank, status) for rank, status in enumerate(statuses) if status)
                print(f"rank {rank} ended with status {status}; the others are given {GRACE_SECONDS} s", flush=True)
            if now - started > self.timeout_s or (failed is not None and now - failed > GRACE_SECONDS):
                break
            if not told and now - started > self.timeout_s - self.signal_delay_s:
                told = True
                self._forward_signal(signal.SIGUSR2)
            time.sleep(1 / freq)
        self.succeeded = not any(statuses) and None not in statuses
        return statuses

    def _kill(self, *_: object) -> None:
        self.cancelled = True
        self._forward_signal(signal.SIGKILL)


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """A context whose new processes ignore Ctrl-C: submitit's controller would kill its tasks before they can save."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _through_ctrl_c(lines: Iterator[str], words: str) -> Iterator[str]:
    """Yield lines, and on Ctrl-C announce `words` and go on: the terminal signals the ranks too, and their last lines
    follow.
    """

    def announce(*_: object) -> None:
        os.write(1, f"{words}\n".encode())  # a second signal must not interrupt the print

    before = signal.signal(signal.SIGINT, announce)
    try:
        yield from lines
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    controller = _Controller(Path(sys.argv[1]))
    controller.run()
    sys.exit(_CANCELLED if controller.cancelled else not controller.succeeded)
