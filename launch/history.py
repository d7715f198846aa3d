"""The history of a run's jobs, as its directory keeps it. Imports no torch.

RUN/submissions.json says what was submitted, when and by whom; RUN/attempts.jsonl how often the jobs started and how
they ended, an event in each line:

start     a job's processes are up: nodes, and the step of the checkpoint that they go on from
bad node  a node that failed its checks, why, and all nodes: the first rank may have ended before it wrote them down
refused   a rank saw, before the first step, a mistake that is the user's to mend
end       the processes have ended: reason, newest checkpoint's step, and the error if there was one
gave up   after too many failures the run does not go on by itself
"""

import enum
import json
import os
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from caduceus.errors import UserError
from caduceus.files import append_json_line, dump_json, read_json_lines, write_atomically
from caduceus.patience import is_file, patient, patiently
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import ends_folder, read_ends
from caduceus.run.provenance import provenance


class Reason(str, enum.Enum):
    """How an attempt ended. The words are those of RUN/attempts.jsonl and of `runs.py status`."""

    COMPLETE = "complete"
    STOPPED = "stopped"
    FAILED = "failed"
    BAD_NODE = "bad node"
    NODE_LOST = "node lost"
    """The node was lost, and the job went on with a spare one."""
    TIME_LIMIT = "time limit"
    UNSAVED = "time limit before the last save was done"
    PREEMPTED = "preempted"
    SIGNAL = "signal"
    CANCELLED = "cancelled"
    """By `runs.py cancel`, scancel, or a SIGTERM to the controller of a local job."""
    TAKEN = "ended by SLURM"
    """SLURM ended it, and does not tell the job why; older versions also used this for a cancelled local job."""
    LOST = "lost"
    """Neither its job nor its ranks recorded an end: its node died, or everything was killed at once."""

    __str__ = str.__str__


FAILURES = (Reason.FAILED, Reason.BAD_NODE, Reason.UNSAVED)
"""Reasons for which a run is given up if they come again and again without a new checkpoint in between."""


RESTART = "CADUCEUS_RESTART"
"""The environment variable with the number of this start, set by a batch script that starts its processes again on its
own nodes.
"""


@dataclass(frozen=True)
class Submission:
    """One submission of a run: its jobs (several in a chain), the folder of their logs, and what was requested."""

    run: Path
    jobs: list[str]
    executor: str
    logs: Path
    request: dict[str, Any]


@dataclass
class Attempt:
    """One start of a job's processes, until their end."""

    job: str
    restart: int
    """Number of this start of the job, which grows; without spare nodes, how often SLURM had started the job before."""
    started: str | None = None
    ended: str | None = None
    nodes: str = ""
    step: int = 0
    """Step of the newest checkpoint at the attempt's end, or at its start where it has not ended."""
    reason: Reason | None = None
    error: str | None = None
    gave_up: bool = False
    refused: bool = False
    bad_nodes: list[str] = field(default_factory=list)


def this_restart() -> int:
    """The number of this start of the job that this process belongs to."""
    return int(os.environ.get(RESTART) or os.environ.get("SLURM_RESTART_COUNT") or 0)


def record_attempt(run: RunDirectory, event: str, job: str, restart: int, **facts: Any) -> None:
    """Append an event of an attempt to RUN/attempts.jsonl."""
    row = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "job": job, "restart": restart, **facts}
    append_json_line(run.path / "attempts.jsonl", row)


@patient
def submissions(run: RunDirectory) -> list[Submission]:
    """Every submission of a run, oldest first."""
    path = run.path / "submissions.json"
    try:
        rows = json.loads(path.read_bytes()) if is_file(path) else []
        return [Submission(run.path, row["jobs"], row["executor"], Path(row["logs"]), row["request"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); repair it, or move it "
            "away if none of its jobs waits or runs"
        ) from None


def record_submission(run: RunDirectory, submission: Submission) -> None:
    """Add a submission to RUN/submissions.json, with its code and command, and by whom and from where it was
    submitted.
    """
    path = run.path / "submissions.json"
    rows = json.loads(patiently(path.read_bytes)) if is_file(path) else []
    entry = {
        "jobs": submission.jobs,
        "executor": submission.executor,
        "logs": str(submission.logs),
        "request": submission.request,
        **provenance(),
    }
    write_atomically(path, dump_json([*rows, entry]))


@patient
def attempts(run: RunDirectory) -> list[Attempt]:
    """All attempts of a run, oldest first. Only the newest may have no reason for its end yet."""
    found: dict[tuple[str, int], Attempt] = {}
    began: dict[tuple[str, int], int] = {}
    for row in read_json_lines(run.path / "attempts.jsonl"):
        key = (row["job"], row["restart"])
        attempt = found.setdefault(key, Attempt(*key))
        if row["event"] == "start":
            attempt.started, attempt.nodes, attempt.step = row["time"], row["nodes"], row["step"]
            began[key] = row["step"]
        elif row["event"] == "bad node":
            attempt.bad_nodes.append(row["node"])
            attempt.nodes = attempt.nodes or row.get("nodes", "")
        elif row["event"] == "refused":
            attempt.refused = True
        elif row["event"] == "end":
            attempt.ended, attempt.reason, attempt.step = row["time"], _reason(run, row["reason"]), row["step"]
            attempt.error = row["error"]
        else:
            attempt.gave_up = True
    in_order = list(found.values())
    for attempt, after in pairwise(in_order):
        if attempt.reason is None:
            by_itself = ended_by_itself(run, attempt)
            same_job = after.job == attempt.job
            attempt.reason = Reason.LOST if not by_itself else Reason.TAKEN if same_job else Reason.SIGNAL
            attempt.step = began.get((after.job, after.restart), attempt.step)
    return in_order


def _reason(run: RunDirectory, words: str) -> Reason:
    try:
        return Reason(words)
    except ValueError:
        raise UserError(
            f"{run.path}/attempts.jsonl: this version knows no end called {words!r}; use the version that wrote it"
        ) from None


def ended_by_itself(run: RunDirectory, attempt: Attempt) -> bool:
    """Whether the ranks of an attempt recorded that they stopped with a checkpoint, although its job recorded no end.

    This happens after a `scontrol requeue` by somebody, where SLURM kills the batch script before its last line.
    """
    ends = read_ends(ends_folder(run.path, attempt.job, attempt.restart))
    return 0 in ends and all(end.kind is None for end in ends.values())


def failures_without_progress(run: RunDirectory, jobs: list[str]) -> int:
    """How many of the newest attempts of these jobs failed in a row without a new checkpoint between them.

    Bad nodes count as failures too: where every node is bad, the nodes are not the cause. So do saves that take longer
    than the time reserved for them. Other time limits, preemption, a requeue by hand and attempts without a recorded
    end are ignored: they neither count nor end the row.
    """
    failures, step = 0, None
    for attempt in reversed([attempt for attempt in attempts(run) if attempt.job in jobs]):
        if step is not None and attempt.step != step:
            break
        step = attempt.step
        failures += attempt.reason in FAILURES
    return failures


def bad_nodes(run: RunDirectory, submission: Submission, job: str, restart: int) -> list[str]:
    """Nodes that failed their checks since SLURM gave the job the nodes that it has at restart number `restart`."""
    starts = submission.request.get("spare", 0) + 1
    same = [a for a in attempts(run) if a.job == job and a.restart // starts == restart // starts]
    return sorted({node for attempt in same for node in attempt.bad_nodes})


@patient
def newest_step(run: RunDirectory) -> int:
    """Step of the newest checkpoint whose files have the right sizes; 0 where there is none."""
    whole = (checkpoint.step for checkpoint in reversed(run.checkpoints()) if not checkpoint.damage(contents=False))
    return next(whole, 0)
