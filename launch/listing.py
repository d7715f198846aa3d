"""The table of all runs below a directory. Imports no torch."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from caduceus.errors import UserError
from caduceus.monitor.wandb.identity import status as wandb_status
from caduceus.patience import is_directory, is_file, patient
from caduceus.run.directory import RunDirectory
from launch import scheduler
from launch.remembered import Remembered, Rows, look
from launch.scheduler import JobState, SilentError
from launch.status import OVER, Overview, overview, slurm_jobs
from launch.terminal import duration, table

_HEADS = ["run", "state", "step", "loss", "valid loss", "bases/s", "left", "starts", "W&B"]


def list_runs(directory: Path) -> str:
    """A table with a row per run below a directory. Raises `UserError` where there is no run."""
    runs, rows = find_runs(directory), Rows(directory)
    known = {run.path: rows.get(run) for run in runs}
    jobs_of = _asked_at_once(runs, known)
    told = [_row(run, known[run.path], rows, jobs_of) for run in runs]
    rows.save()
    return table(_HEADS, told)


@patient
def find_runs(directory: Path) -> list[RunDirectory]:
    """The run directories in a directory, and in the sweeps in it."""
    runs = [RunDirectory(path) for path in sorted(_run_paths(directory, depth=2))]
    if not runs:
        raise UserError(f"{directory}: there are no runs in here; give the directory that holds the run directories")
    return runs


def _run_paths(directory: Path, depth: int) -> Iterator[Path]:
    """The run directories up to `depth` levels below a directory; a run contains no other run."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            path = Path(entry.path)
            if is_file(path / "config.yaml") and is_directory(path / "checkpoints"):
                yield path
            elif depth > 1 and is_directory(entry):
                yield from _run_paths(path, depth - 1)


def _asked_at_once(
    runs: Sequence[RunDirectory], known: dict[Path, Remembered | None]
) -> Callable[[RunDirectory], dict[str, JobState]]:
    """The answer of SLURM about the jobs of any of the runs, which is asked once for all; it raises `SilentError`."""
    jobs: dict[Path, list[str]] = {}
    for run in runs:
        remembered = known[run.path]
        with contextlib.suppress(UserError):  # the error comes again, and is shown, when the run itself is read
            jobs[run.path] = slurm_jobs(run) if remembered is None else remembered.jobs
    found, silence = {}, None
    try:
        found = scheduler.live_jobs([job for own in jobs.values() for job in own])
    except SilentError as error:
        silence = error

    def of(run: RunDirectory) -> dict[str, JobState]:
        own = jobs.get(run.path, [])
        if own and silence is not None:
            raise silence
        return {job: found[job] for job in own if job in found}

    return of


def _row(
    run: RunDirectory,
    remembered: Remembered | None,
    rows: Rows,
    jobs_of: Callable[[RunDirectory], dict[str, JobState]],
) -> list[str]:
    if remembered is not None:
        with contextlib.suppress(SilentError):
            if not jobs_of(run):
                return remembered.row
    seen = look(run)
    try:
        now = overview(run, jobs_of)
        jobs = slurm_jobs(run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return [str(run.path), "unreadable", *"-" * (len(_HEADS) - 2)]
    row = [
        str(run.path),
        now.state,
        f"{now.step:,}/{now.steps:,}",
        number(now.loss),
        number(now.valid_loss),
        rate(now),
        duration(now.seconds_left) if now.live and now.seconds_left is not None else "-",
        str(now.starts),
        (sent.url if (sent := wandb_status(run.path)) else None) or "-",
    ]
    if now.state in OVER and not jobs_of(run):
        rows.keep(run, Remembered(seen, row, jobs))
    return row


def number(value: float | None) -> str:
    """A loss as text."""
    return "-" if value is None else f"{value:.4f}"


def rate(now: Overview) -> str:
    """Bases per second as text."""
    return "-" if now.tokens_per_second is None else f"{now.tokens_per_second:,.0f}"
