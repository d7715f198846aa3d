"""python launch/runs.py list [DIR] | status RUN | logs RUN [--rank R] [-f] | stop RUN | cancel RUN
                       resume RUN [--nodes M] [key.path=value …] | sync RUN

Shows and controls runs. RUN is a run directory, such as runs/ps-131k; it keeps what SLURM has forgotten.
"""

import argparse
import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from caduceus.arguments import Parser
from caduceus.config import load_config
from caduceus.errors import UserError, run_command
from caduceus.monitor.wandb.identity import status as wandb_status
from caduceus.monitor.wandb.process import sync
from caduceus.patience import exists
from caduceus.run.directory import RunDirectory
from launch import history, local_jobs, scheduler
from launch.history import Attempt, Submission, submissions
from launch.listing import list_runs, number, rate
from launch.logs import follow, log_path
from launch.request import JobRequest, check_request
from launch.slurm import check_and_start
from launch.status import UNKNOWN, WAITING, Overview, live_jobs_of, overview
from launch.terminal import duration, runs_command

_ENDING_SECONDS = 90
"""Seconds that a cancelled run may take to end: SLURM kills processes that still run after KillWait, 30 s by default.
"""
_START = """
Shows and controls runs. To begin:

  {caduceus-runs} list  # a table of all runs below runs/
  {caduceus-runs} status runs/ps-1k  # where a run stands, and what became of each of its jobs
  {caduceus-runs} logs runs/ps-1k -f  # what it says
  {caduceus-runs} --help  # stop, cancel, resume

A run is started by {caduceus-launch} on a cluster, or by {caduceus-train} here.
"""
_ASK_SECONDS = 5.0
"""Seconds between checks, while a log is followed, whether its run is still alive."""


def main() -> int:
    """Run the command. Returns the exit status."""
    arguments = parse_arguments()
    if arguments.action in ("list", "status", "logs"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as `| head` ends it silently
    if arguments.action == "list":
        print(list_runs(arguments.directory))
        return 0
    run = RunDirectory.open(arguments.run)
    if arguments.action == "status":
        print(status(run))
    elif arguments.action == "logs":
        show_log(run, arguments.rank, arguments.follow)
    elif arguments.action == "sync":
        return sync(run)
    elif arguments.action == "stop":
        stop(run)
    elif arguments.action == "cancel":
        cancel(run)
    else:
        return resume(run, arguments.nodes, arguments.overrides)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        called="caduceus-runs",
        start=_START,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="a table of all runs below a directory")
    listing.add_argument(
        "directory", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="where the runs are (%(default)s)"
    )
    texts = {
        "status": "step, loss, rate, time left, checkpoints, and every start and end so far",
        "logs": "the newest log of a rank",
        "stop": "save a checkpoint and end; the run stays stopped until it is resumed",
        "sync": "send Weights & Biases the data of the run that it lacks",
        "cancel": "end at once; the steps after the newest checkpoint are lost",
        "resume": "submit again as before, or with another number of nodes or other values of keys",
    }
    added = {name: actions.add_parser(name, help=text) for name, text in texts.items()}
    for action in added.values():
        action.add_argument("run", type=Path, metavar="RUN", help="run directory")
    added["logs"].add_argument("--rank", type=int, default=0, metavar="R", help="whose log (%(default)s)")
    added["logs"].add_argument("-f", "--follow", action="store_true", help="show new lines, while the run is alive")
    added["resume"].add_argument("--nodes", type=int, metavar="M", help="on another number of nodes")
    settings = "keys to change, such as train.micro_batch=2"
    added["resume"].add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=settings)
    # argparse accepts the positional arguments of a subcommand only before its first option.
    arguments, further = parser.parse_known_args()
    if further and (arguments.action != "resume" or any(text.startswith("-") for text in further)):
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    if further:
        arguments.overrides += further
    return arguments


def status(run: RunDirectory) -> str:
    """Print several lines about a run."""
    now = overview(run)
    lines = [
        ("run", str(run.path)),
        ("state", now.state + (f": {now.why}" if now.why else "")),
        ("step", f"{now.step:,} of {now.steps:,}"),
        ("loss", f"{number(now.loss)}   validation {number(now.valid_loss)}"),
        ("rate", f"{rate(now)} bases/s"),
    ]
    if now.live and now.seconds_left is not None:
        lines.append(("time left", duration(now.seconds_left)))
    if now.live and now.quiet_seconds is not None:
        lines.append(("last step", f"{duration(now.quiet_seconds)} ago"))
    checkpoint = run.checkpoint_path(now.checkpoint)
    lines.append(("checkpoint", str(checkpoint) if now.checkpoint else "none yet"))
    sent = wandb_status(run.path)
    if sent is not None:
        lines.append(("W&B", f"{sent.state}, has step {sent.step:,}   {sent.url or ''}".rstrip()))
    if now.jobs:
        lines.append(("job", " ".join(now.jobs)))
    if now.attempts:
        lines.append(("nodes", now.attempts[-1].nodes))
    starts = [*map(_told_by_hand, now.by_hand), *map(_told, now.attempts)]
    lines += [("start" if number == 0 else "", told) for number, told in enumerate(starts)]
    return "\n".join(f"{name:<12}{value}" for name, value in lines)


def show_log(run: RunDirectory, rank: int, following: bool) -> None:
    """Print the newest log of a rank; with `following`, also new lines, of later jobs too, until the run is over.

    With `following` it waits for a run that waits to start.
    """
    submitted = submissions(run)
    if not submitted:
        raise UserError(f"{run.path}: was not started by launch/slurm.py, so its log is where it was started")
    now = overview(run)
    job = _newest_job(now, submitted)
    path = _log_of(submitted, job, rank)
    if not following:
        if not exists(path):
            waits = f"the run waits to start; {runs_command('logs -f', run.path)} waits with it"
            raise UserError(f"{path}: there is no such log; {waits if now.state == WAITING else 'choose a rank'}")
        print(path.read_text(errors="replace"), end="")
        return
    with contextlib.suppress(KeyboardInterrupt):
        while job is not None:
            if now.state == WAITING:
                print(f"{run.path}: waits to start ({now.why})", file=sys.stderr, flush=True)
            path, shown = _log_of(submitted, job, rank), job
            for line in follow(path, _asked_now_and_then(lambda shown=shown: not _is_at(run, shown))):
                print(line, end="", flush=True)
            submitted, now = submissions(run), overview(run)
            job = _newest_job(now, submitted) if now.live else None
            job = None if job == shown else job
        if not exists(path):
            raise UserError(
                f"{path}: there is no such log; the run is {now.state}" + (f": {now.why}" if now.why else "")
            )


def _newest_job(now: Overview, submitted: list[Submission]) -> str:
    """The job whose log to show: the newest that started, or else the first that waits."""
    started = [attempt.job for attempt in now.attempts]
    if now.jobs and not set(now.jobs) & set(started):
        return now.jobs[0]
    return started[-1] if started else submitted[-1].jobs[0]


def _log_of(submitted: list[Submission], job: str, rank: int) -> Path:
    return log_path(next(entry.logs for entry in reversed(submitted) if job in entry.jobs), job, rank)


def _is_at(run: RunDirectory, job: str) -> bool:
    """Whether a run is alive, and still in this job."""
    now = overview(run)
    return now.live and _newest_job(now, submissions(run)) == job


def _asked_now_and_then(question: Callable[[], bool]) -> Callable[[], bool]:
    """A function with the answer to `question`, which it asks only from time to time, and no more after a yes."""
    asked, answer = -math.inf, False

    def ask() -> bool:
        nonlocal asked, answer
        if not answer and time.monotonic() - asked > _ASK_SECONDS:
            asked, answer = time.monotonic(), question()
        return answer

    return ask


def stop(run: RunDirectory) -> None:
    """Let a run save and end; a run that waits is taken out of the queue."""
    now = _live(run)
    run.stop_path.touch()
    if now.state == WAITING:
        scheduler.cancel(now.jobs)
        print(f"{run.path}: taken out of the queue")
    else:
        print(f"{run.path}: stops after its current step, with a checkpoint")
    print(f"{runs_command('resume', run.path)} goes on with it")


def cancel(run: RunDirectory) -> None:
    """End a run at once, and print which checkpoint is left."""
    now = _live(run)
    if not now.jobs:
        live_jobs_of(run)  # raises an error where SLURM does not answer
        raise UserError(f"{run.path}: runs as a process of this machine, not as a job; end it where it was started")
    submission = submissions(run)[-1]
    is_local = submission.executor == "local"
    if is_local:
        local_jobs.kill(now.jobs[0])
    else:
        scheduler.cancel(now.jobs)

    def lives() -> bool:
        in_job = local_jobs.is_running(now.jobs[0], submission.logs) if is_local else bool(live_jobs_of(run))
        return in_job or run.is_in_use()

    deadline = time.monotonic() + _ENDING_SECONDS
    while lives() and time.monotonic() < deadline:  # its processes may still save
        time.sleep(0.2)
    if is_local and not lives():
        _record_cancelled(run, now.jobs[0])
    step, checkpoint = overview(run).step, history.newest_step(run)
    left = f"its newest checkpoint is of step {checkpoint:,}: {run.checkpoint_path(checkpoint)}"
    print(f"{run.path}: cancelled at step {step:,}; {left if checkpoint else 'there is no checkpoint of it'}")


def _record_cancelled(run: RunDirectory, job: str) -> None:
    """Record how a local job ended. Normally the command that started it does this, but it may be gone."""
    open_ended = any(attempt.job == job and attempt.reason is None for attempt in history.attempts(run))
    if open_ended:
        step = history.newest_step(run)
        history.record_attempt(run, "end", job, 0, reason=history.Reason.CANCELLED, step=step, error=None)


def resume(run: RunDirectory, nodes: int | None, overrides: list[str]) -> int:
    """Submit a run again as it was submitted last, perhaps on another number of nodes or with changed keys."""
    now = _known(run)
    if now.live:
        job = " ".join(now.jobs) or "of this machine"
        raise UserError(f"{run.path}: is {now.state} (job {job}); stop it first: {runs_command('stop', run.path)}")
    if now.state == "complete":
        raise UserError(f"{run.path}: is complete, at step {now.step:,}; there is nothing to resume")
    submitted = submissions(run)
    if not submitted:
        raise UserError(f"{run.path}: was not started by launch/slurm.py; start it again as it was started")
    keys = {field.name for field in fields(JobRequest)}
    request = JobRequest(**{key: value for key, value in submitted[-1].request.items() if key in keys})
    if nodes is not None:
        request = replace(request, nodes=nodes)
        check_request(request)
    if any(setting.startswith("run.dir=") for setting in overrides):
        raise UserError("run.dir: a run is resumed in its own directory; move the directory, or start another run")
    config = load_config(run.config_path, overrides)
    config.run.dir = str(run.path)
    return check_and_start(config, request)


def _told_by_hand(start: dict[str, Any]) -> str:
    return f"{start.get('time')}  on {start.get('host')}, without a job, from step {start.get('step', 0):,}"


def _told(attempt: Attempt) -> str:
    """One start of a run and its end, in one line."""
    told = f"{attempt.started or 'never started'}  job {attempt.job}"
    if attempt.reason is None:
        return told
    bad = f", without {' '.join(attempt.bad_nodes)} from then on" if attempt.bad_nodes else ""
    error = f": {attempt.error}" if attempt.error else ""
    return f"{told}  ended with checkpoint {attempt.step:,}: {attempt.reason}{bad}{error}"


def _live(run: RunDirectory) -> Overview:
    now = _known(run)
    if not now.live:
        raise UserError(f"{run.path}: the run neither runs nor waits; it is {now.state}")
    return now


def _known(run: RunDirectory) -> Overview:
    now = overview(run)
    if now.state == UNKNOWN:
        raise UserError(f"{run.path}: {now.why}")
    return now


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
