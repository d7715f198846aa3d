"""The state of a run, from its directory and, where there is one, SLURM. Imports no torch."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from caduceus.patience import exists, is_file, listed, patient, patiently
from caduceus.run.directory import RunDirectory
from launch import history, local_jobs, scheduler
from launch.history import Attempt, Submission, attempts, newest_step, submissions
from launch.logs import last_error
from launch.scheduler import IN_QUEUE, JobState, SilentError

OVER = ("complete", "stopped", "failed", "given up", "cancelled", "interrupted")
"""States that can only change through a process or job that leaves a trace in the run's directory or the queue."""
RUNNING, STOPPING, WAITING, LOST, UNKNOWN = "running", "stopping", "waiting", "lost", "unknown"
_RECENT_ROWS = 50
_STOPPED_BY = {
    "TIMEOUT": history.Reason.TIME_LIMIT,
    "PREEMPTED": history.Reason.PREEMPTED,
    "CANCELLED": history.Reason.CANCELLED,
}
"""The reason why ranks stopped with a checkpoint, by the final state of their job in SLURM."""
_State = tuple[str, str | None, list[str]]


@dataclass(frozen=True)
class Overview:
    """The state of a run. Unknown values are None."""

    state: str
    """running, stopping, waiting, complete, stopped, failed, given up, cancelled, interrupted, lost, new or unknown."""
    why: str | None
    """Why SLURM lets it wait, the error that ended it, how it was lost, or why the state is unknown."""
    jobs: list[str]
    """Jobs that run or wait."""
    step: int
    steps: int
    loss: float | None
    valid_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    """The trainer's estimate, which counts validations."""
    checkpoint: int
    """Step of the newest checkpoint; 0 is none."""
    quiet_seconds: float | None
    """Seconds since the last row of metrics.jsonl."""
    attempts: list[Attempt]
    """Starts of its jobs, including those that never began to train."""
    by_hand: list[dict[str, Any]]
    """Starts without a job, as in provenance.json."""

    @property
    def starts(self) -> int:
        return len(self.attempts) + len(self.by_hand)

    @property
    def live(self) -> bool:
        return self.state in (RUNNING, STOPPING, WAITING)


def live_jobs_of(run: RunDirectory) -> dict[str, JobState]:
    """The SLURM jobs of a run that wait or train.

    Raises `SilentError` where there may be such jobs and SLURM does not answer.
    """
    return scheduler.live_jobs(slurm_jobs(run))


def slurm_jobs(run: RunDirectory) -> list[str]:
    """All SLURM jobs that were submitted for a run."""
    return [job for entry in submissions(run) if entry.executor == "slurm" for job in entry.jobs]


@patient
def overview(run: RunDirectory, jobs_of: Callable[[RunDirectory], dict[str, JobState]] = live_jobs_of) -> Overview:
    """The state of a run, also where SLURM has forgotten its jobs or does not answer."""
    recent, validations = run.newest_metrics("loss", _RECENT_ROWS), run.newest_metrics("valid_loss")
    steps, step = run.steps(), recent[-1]["step"] if recent else 0
    state, why, jobs = _state(run, steps, step > 0, jobs_of)
    return Overview(
        state=state,
        why=why,
        jobs=jobs,
        step=step,
        steps=steps,
        loss=recent[-1]["loss"] if recent else None,
        valid_loss=validations[-1]["valid_loss"] if validations else None,
        tokens_per_second=median(row["tokens_per_second"] for row in recent) if recent else None,
        seconds_left=recent[-1].get("seconds_left") if recent else None,
        checkpoint=newest_step(run),
        quiet_seconds=time.time() - patiently(run.metrics_path.stat).st_mtime if recent or validations else None,
        attempts=attempts(run),
        by_hand=_by_hand(run),
    )


def _by_hand(run: RunDirectory) -> list[dict[str, Any]]:
    """The starts without a job. Older versions did not record which: where a run has jobs, such starts count
    as theirs.
    """
    starts, had_jobs = run.starts(), bool(attempts(run))
    return [start for start in starts if not start.get("in_job", had_jobs)]


def _state(
    run: RunDirectory, steps: int, begun: bool, jobs_of: Callable[[RunDirectory], dict[str, JobState]]
) -> _State:
    """The state, the reason, and the jobs that wait or run."""
    stop = is_file(run.stop_path)
    submitted, found = submissions(run), attempts(run)
    try:
        jobs, silence = jobs_of(run), None
    except SilentError as error:
        jobs, silence = {}, str(error)
    if jobs:
        waiting = all(job.state in IN_QUEUE for job in jobs.values())
        reason = next(iter(jobs.values())).reason if waiting else None
        return (WAITING if waiting else STOPPING if stop else RUNNING), reason, list(jobs)
    newest = submitted[-1] if submitted else None
    if newest and newest.executor == "local" and local_jobs.is_running(newest.jobs[0], newest.logs):
        return (STOPPING if stop else RUNNING), None, newest.jobs
    if run.is_in_use():
        holder = run.holder()
        if holder is None or holder.slurm_job is None or scheduler.may_be_live(holder.slurm_job):
            return (STOPPING if stop else RUNNING), None, []
        signs = _signs_of_life(run, holder.slurm_job, scheduler.end_of(holder.slurm_job), submitted)
        return LOST, f"{signs}; {holder} still runs: end it, or resume", []
    if newest_step(run) >= steps:
        return "complete", None, []
    if silence and not (found and (found[-1].gave_up or found[-1].reason == history.Reason.STOPPED)):
        return UNKNOWN, silence, []
    if found := _ended(run, submitted):
        return _how_it_ended(found[-1], stop)
    if stop:
        return "stopped", None, []
    return ("interrupted" if begun else "new"), None, []


def _how_it_ended(last: Attempt, stop: bool) -> _State:
    if last.gave_up:
        return "given up", last.error, []
    if last.reason == history.Reason.FAILED:
        return "failed", last.error, []
    if stop or last.reason == history.Reason.STOPPED:
        return "stopped", None, []
    if last.reason in (history.Reason.CANCELLED, history.Reason.TAKEN):
        return "cancelled", None, []
    if last.reason == history.Reason.COMPLETE:
        return "interrupted", "the checkpoint of its last step is gone; resume makes it again", []
    if last.reason == history.Reason.LOST:
        return LOST, last.error, []
    return "interrupted", last.reason, []


def _ended(run: RunDirectory, submitted: list[Submission]) -> list[Attempt]:
    """The attempts of a run without a live job; the newest gets an end where its job recorded none."""
    found = attempts(run)  # read again: the end may have been recorded just before SLURM forgot the job
    if not found or found[-1].reason is not None:
        return found
    last = found[-1]
    of_slurm = not any(last.job in entry.jobs and entry.executor == "local" for entry in submitted)
    state = scheduler.end_of(last.job) if of_slurm else None
    if history.ended_by_itself(run, last):
        reason, told = _STOPPED_BY.get(state or "", history.Reason.SIGNAL), None
    elif error := last_error(run, submitted[-1].logs, last.job, last.restart) if submitted else None:
        reason, told = history.Reason.FAILED, error
    else:
        reason, told = history.Reason.LOST, _signs_of_life(run, last.job, state, submitted)
    with contextlib.suppress(OSError):  # a user who may only read
        history.record_attempt(run, "end", last.job, last.restart, reason=reason, step=newest_step(run), error=told)
    last.reason, last.error, last.step = reason, told, newest_step(run)
    return found


def _signs_of_life(run: RunDirectory, job: str, state: str | None, submitted: list[Submission]) -> str:
    """What is known about a job without a recorded end, and when its processes last wrote something.

    state: the final state that SLURM tells.
    """
    entries = [entry for entry in submitted if job in entry.jobs]
    logs = [path for entry in submitted for path in listed(entry.logs, f"{job}_*_log.out")]
    written = [patiently(path.stat).st_mtime for path in (run.metrics_path, *logs) if exists(path)]
    last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(written))) if written else "none"
    if any(entry.executor == "local" for entry in entries):
        told = "on this machine is gone"
    else:
        told = f"ended as {state}" if state else "is no longer known to SLURM"
    return f"job {job} {told}; last sign of life: {last}"
