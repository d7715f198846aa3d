"""python -m launch.requeue RUN STATUS: the last line of a batch script, after its srun has ended with STATUS.

python -m launch.requeue RUN TERM: the script runs this on SIGTERM. If the time limit is the cause, the processes are
still writing their last checkpoint, and SLURM kills them and the script when KillWait is over; the job must be in the
queue before that.

It records how the processes ended, and puts the job back into SLURM's queue where the run should go on by itself. A run
that fails again and again without a new checkpoint in between is given up. A run with a mistake that only its user can
correct is given up at once.
"""

import math
import os
import sys
import time

from caduceus.errors import UserError, run_command
from caduceus.patience import exists
from caduceus.run.directory import RunDirectory
from launch import history, scheduler
from launch.history import Reason, Submission, newest_step, submissions
from launch.logs import last_error
from launch.scheduler import OwnJob
from launch.terminal import runs_command

EARLIEST_SIGNAL_SECONDS = 60
"""Seconds by which SLURM may send the signal before a time limit earlier than requested."""


_RECORD_SECONDS = 60
"""Seconds for which a job that has ended waits for its submission to be recorded."""


def main() -> int:
    """Decide what becomes of the job that this process belongs to. Returns the batch script's exit status."""
    run, status = RunDirectory.open(sys.argv[1]), None if sys.argv[2] == "TERM" else int(sys.argv[2])
    job, restart = this_job(), history.this_restart()
    submission = submission_of(run, job)
    this = next((row for row in history.attempts(run) if (row.job, row.restart) == (job, restart)), None)
    if this is not None and this.ended is not None:  # settled on SIGTERM, and KillWait was long enough for the save
        reason = Reason.TIME_LIMIT if newest_step(run) > this.step else this.reason
        error = this.error if reason == this.reason else None
        history.record_attempt(
            run, "end", job, restart, reason=reason, step=newest_step(run), error=error, status=status
        )
        return 1
    slurm_job = ask_slurm(job)
    if not is_current(slurm_job):
        # This node's slurmd had died: SLURM has started the job again on other nodes, and that attempt has the run.
        return 1
    signal_seconds = submission.request["signal_seconds"]
    if status is not None:
        reason = why_ended(run, status, slurm_job, this.bad_nodes if this else [], signal_seconds)
        error = last_error(run, submission.logs, job, restart) if reason in (Reason.FAILED, Reason.BAD_NODE) else None
    elif must_go_on_unsaved(run, slurm_job):
        reason, error = (
            Reason.UNSAVED,
            f"signal_seconds: {signal_seconds} s are too short for a checkpoint; raise it",
        )
    else:
        return 0
    history.record_attempt(run, "end", job, restart, reason=reason, step=newest_step(run), error=error, status=status)
    refused = reason == Reason.FAILED and this is not None and this.refused
    gave_up = give_up(run, submission, job, restart, reason, refused, error)
    if reason in (Reason.COMPLETE, Reason.STOPPED) or gave_up:
        cancel_chain([later for later in submission.jobs if later != job])
        return int(gave_up)
    if reason == Reason.TAKEN:
        return 1
    goes_on = go_on(job, submission, slurm_job, reason, history.bad_nodes(run, submission, job, restart))
    return 0 if status == 0 and goes_on else 1


def is_current(job: OwnJob) -> bool:
    """Whether this process belongs to SLURM's newest start of its job."""
    return job.restarts == int(os.environ.get("SLURM_RESTART_COUNT", 0))


def submission_of(run: RunDirectory, job: str) -> Submission:
    """The submission of a job. The job may have ended before all jobs of its chain were submitted, so this waits for
    it.
    """
    deadline = time.monotonic() + _RECORD_SECONDS
    while not (found := [entry for entry in submissions(run) if job in entry.jobs]):
        if time.monotonic() > deadline:
            raise UserError(f"{run.path}: job {job} is not among its submissions; resume the run by hand")
        time.sleep(0.5)
    return found[-1]


def give_up(
    run: RunDirectory, submission: Submission, job: str, restart: int, reason: Reason, refused: bool, error: str | None
) -> bool:
    """Whether to give the run up; this is then recorded."""
    failures = history.failures_without_progress(run, submission.jobs)
    too_often = reason in history.FAILURES and failures >= submission.request["max_failures"]
    if refused or too_often:
        history.record_attempt(run, "gave up", job, restart)
        why = "for a mistake" if refused else f"after {failures} failures without a new checkpoint; the last one"
        print(f"given up {why}: {error}", flush=True)
    return refused or too_often


def this_job() -> str:
    """Id of the SLURM job of this process; ARRAY_TASK for a task of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def why_ended(run: RunDirectory, status: int, job: OwnJob, bad_nodes: list[str], signal_seconds: int) -> Reason:
    """The reason of an end, for the run's history; `status`: that of srun, which is 0 after a stop with a save."""
    if newest_step(run) >= run.config().train.steps:
        return Reason.COMPLETE
    if exists(run.stop_path):
        return Reason.STOPPED if status == 0 else Reason.FAILED
    if job.state != "RUNNING":
        return Reason.TIME_LIMIT if job.reason == "TimeLimit" else Reason.TAKEN
    if status:
        return Reason.BAD_NODE if bad_nodes else Reason.FAILED
    if job.preempted:
        return Reason.PREEMPTED
    near_the_end = job.seconds_left <= signal_seconds + EARLIEST_SIGNAL_SECONDS
    return Reason.TIME_LIMIT if near_the_end else Reason.SIGNAL


def must_go_on_unsaved(run: RunDirectory, job: OwnJob) -> bool:
    """Whether a time limit ends the job while its processes still run, and the run should go on."""
    at_its_limit = job.state != "RUNNING" and job.reason == "TimeLimit"
    return at_its_limit and not exists(run.stop_path) and newest_step(run) < run.config().train.steps


def ask_slurm(job: str) -> OwnJob:
    """SLURM's answer about this job; in a container without SLURM's commands, what the environment variables tell."""
    try:
        return scheduler.own_job(job)
    except scheduler.SilentError as error:
        print(f"note: {error}; SLURM's view of this job is unknown", flush=True)
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        left = int(end) - time.time() if end.isdigit() and int(end) else math.inf
        state, reason = ("RUNNING", "None") if left > 0 else ("TIMEOUT", "TimeLimit")
        return OwnJob(state, reason, False, left, "", int(os.environ.get("SLURM_RESTART_COUNT", 0)))


def go_on(job: str, submission: Submission, slurm_job: OwnJob, reason: Reason, bad_nodes: list[str]) -> bool:
    """Put the job back into the queue without bad nodes, or leave the run to the next job of its chain.

    Returns whether a job goes on with the run.
    """
    by_hand = f"the run does not go on by itself: {runs_command('resume', submission.run)}"
    later = submission.jobs[submission.jobs.index(job) + 1 :]
    if submission.request["requeue"]:
        try:
            scheduler.requeue(job)
        except UserError as error:
            print(f"{reason}: {error}; {by_hand}", flush=True)
            return False
        print(f"{reason}: the job goes back into the queue", flush=True)
        later = [job]
    if not later:
        print(f"{reason}: no further job was submitted; {by_hand}", flush=True)
        return False
    if bad_nodes:
        # SLURM accepts this only for a waiting job. A requeued job waits at least until this process has ended.
        excluded = ",".join(filter(None, [slurm_job.excluded, *bad_nodes]))
        try:
            scheduler.exclude_nodes(later[0], excluded)
        except UserError as error:
            print(f"{excluded} could not be excluded: {error}", flush=True)
        else:
            print(f"from now on the job avoids {excluded}", flush=True)
    return True


def cancel_chain(jobs: list[str]) -> None:
    """Cancel the jobs of a chain that are no longer needed; a job that starts nevertheless finds nothing to do."""
    try:
        scheduler.cancel(jobs)
    except UserError as error:
        print(f"note: {error}", flush=True)


if __name__ == "__main__":
    run_command(main)
