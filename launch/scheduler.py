"""The only door to SLURM: sbatch, squeue, sinfo, scontrol, sacct and scancel. Imports no torch.

The commands get an environment that says where the cluster is, and nothing that changes their answers or requests: a
user's SQUEUE_STATES must not hide a job, nor SBATCH_PARTITION move one. Answers are read by the positions of their
fields, in a format that is requested here; they contain no field that a user can write, such as a job's comment.
"""

import contextlib
import math
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from caduceus.errors import UserError

_FINDS_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK_KEY", "SLURM_SACK_JWKS")
_OF_SLURM = re.compile(r"(SLURM|SLURMD|SBATCH|SQUEUE|SINFO|SCONTROL|SCANCEL|SACCT|SALLOC|SRUN)_")
_CONTROLLER_SECONDS = 600
"""Seconds that a SLURM controller may take to come back before a job stops asking it."""
_NO_ANSWER = re.compile(
    r"Unable to contact|Connection refused|timed out|communication|Zero Bytes|standby|temporarily unavailable",
    re.IGNORECASE,
)
"""Messages of SLURM's commands that mean that they got no answer, as opposed to a refusal."""
_ASKED_AT_ONCE = 5000
"""Largest number of jobs per call of squeue: Linux allows 128 KiB in an argument."""
_FORGOTTEN = "Invalid job id"
_ENDED_UNKNOWN = ("RUNNING", "PENDING")
"""States of jobs in the accounting that neither wait nor run any more, but whose end it has not recorded."""
IN_QUEUE = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
"""States of a job, by squeue's names, in which it has no nodes yet."""
_CANNOT_START = ("down", "drain", "fail", "inval", "maint", "reboot", "reserved", "unknown", "powering_down", "future")
"""Beginnings of sinfo's states of nodes that take no job now, but may do so later."""


class SilentError(UserError):
    """SLURM gives no answer: the command is absent on this machine, or the controller does not answer."""


@dataclass(frozen=True)
class JobState:
    """SLURM's facts about a job that waits or runs."""

    state: str
    reason: str


@dataclass(frozen=True)
class OwnJob:
    """SLURM's facts about the job that this process belongs to."""

    state: str
    reason: str
    preempted: bool
    seconds_left: float
    excluded: str
    """Nodes that the job must not get, in SLURM's form of a list."""
    restarts: int


@dataclass(frozen=True)
class Nodes:
    """Equal nodes of a partition, as in a line of sinfo."""

    partition: str
    is_default: bool
    is_up: bool
    """Whether the partition starts jobs."""
    state: str
    count: int
    cpus: int
    memory: int
    """Memory of a node, in MB."""
    gres: str
    limit: str
    """Time limit of a job: `infinite`, or in SLURM's forms."""

    @property
    def can_start(self) -> bool:
        return self.is_up and not self.state.startswith(_CANNOT_START) and not self.state.endswith("*")

    def gpus(self, kind: str | None) -> int:
        """The number of GPUs (of a kind) on a node."""
        found = re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)", self.gres)
        return sum(int(count) for its_kind, count in found if kind is None or its_kind == kind)


def environment() -> dict[str, str]:
    """This process's environment, without variables that change the answers and requests of SLURM's commands."""
    return {
        name: value for name, value in os.environ.items() if name in _FINDS_THE_CLUSTER or not _OF_SLURM.match(name)
    }


def unused_settings() -> list[str]:
    """Environment variables with which the user may have meant to set parts of the request, but which have
    no effect.
    """
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """A context in which this process has `environment()`: submitit starts sbatch by itself, and sbatch
    passes it on.
    """
    before = dict(os.environ)
    for name in before.keys() - environment().keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def is_here(command: str) -> bool:
    """Whether this machine has a command of SLURM."""
    return shutil.which(command) is not None


def nodes() -> list[Nodes]:
    """All partitions and nodes. Raises `SilentError`."""
    result = _run("sinfo", "--noheader", "--exact", "--format=%P|%a|%T|%D|%c|%m|%G|%l")
    if result.returncode:
        raise SilentError(f"SLURM does not answer ({last_line(result.stderr)})")
    found = []
    for partition, up, state, count, cpus, memory, gres, limit in _fields(result.stdout, 8):
        numbers = [int(re.match(r"\d*", text)[0] or 0) for text in (count, cpus, memory)]
        name = partition.removesuffix("*")
        values = (name, partition.endswith("*"), up == "up", state, *numbers, gres, limit)
        found.append(Nodes(*values))
    return found


def objection(script: str) -> str | None:
    """The objection of `sbatch --test-only` to a batch script, in one line; None where the job would start at some
    time.

    It also objects to jobs that sbatch would queue until nodes come back.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        result = _run("sbatch", "--test-only", file.name)
    return last_line(result.stderr) if result.returncode else None


def live_jobs(jobs: Sequence[str]) -> dict[str, JobState]:
    """Those of the jobs that wait or run. Raises `SilentError` where SLURM does not answer."""
    if not jobs:
        return {}
    found, asked, numbers = {}, set(jobs), sorted({job.split("_")[0] for job in jobs})
    for first in range(0, len(numbers), _ASKED_AT_ONCE):
        some = ",".join(numbers[first : first + _ASKED_AT_ONCE])
        result = _run("squeue", "--noheader", "--array", f"--jobs={some}", "--format=%A|%F_%K|%T|%r")
        # squeue fails for a job that SLURM has forgotten, and such a job is not alive.
        if result.returncode and _FORGOTTEN not in result.stderr:
            raise SilentError(f"SLURM does not answer ({last_line(result.stderr)})")
        for number, of_array, state, reason in _fields(result.stdout, 4):
            job = of_array if of_array in asked else number
            if job in asked:
                found[job] = JobState(state, reason)
    return found


def may_be_live(job: str) -> bool:
    """Whether a job waits or runs, or SLURM does not answer."""
    try:
        return bool(live_jobs([job]))
    except SilentError:
        return True


def end_of(job: str) -> str | None:
    """The final state of a job that neither waits nor runs; None where SLURM does not know the job any more."""
    for command in (
        ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"],
        ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State"],
    ):
        if is_here(command[0]):
            told = _run(*command).stdout.split()
            if told and told[0] not in _ENDED_UNKNOWN:
                return told[0]
    return None


def own_job(job: str) -> OwnJob:
    """The facts about the job that this process belongs to. Waits for a controller that is being restarted.

    Raises `SilentError` where SLURM does not answer.
    """
    question = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job}"]
    of_job = _answer([*question, "--format=%A|%F_%K|%T|%L|%x|%r"], 6, job)
    # These two fields have no letter for --format, and the excluded nodes have no name for --Format.
    names = ("JobID", "ArrayJobID", "ArrayTaskID", "RestartCnt", "PreemptTime")
    of_starts = _answer([*question, f"--Format={','.join(f'{name}:|' for name in names)}"], 6, job)
    _, _, state, left, excluded, reason = of_job
    _, _, _, restarts, preempted, _ = of_starts
    return OwnJob(
        state=state,
        reason=reason,
        preempted=preempted[:1].isdigit(),
        seconds_left=_seconds(left),
        excluded=excluded.replace("(null)", ""),
        restarts=int(restarts),
    )


def nodes_of(job: str) -> list[str]:
    """Names of the nodes that a running job has, without those that it has lost. Raises `SilentError`."""
    question = ["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%A|%F_%K|%N"]
    return node_names(_answer(question, 3, job)[2])


def node_names(nodes: str) -> list[str]:
    """The names in one of SLURM's lists of nodes, such as n[0-3,7]. Raises `SilentError`."""
    return _insist(["scontrol", "show", "hostnames", nodes]).split() if nodes else []


def requeue(job: str) -> None:
    """Put a running job back into the queue. Raises `UserError` where SLURM refuses, `SilentError` where it does not
    answer.
    """
    _insist(["scontrol", "requeue", job])


def exclude_nodes(job: str, names: str) -> None:
    """Exclude nodes permanently from a waiting job. Raises what `requeue` raises."""
    _insist(["scontrol", "update", f"JobId={job}", f"ExcNodeList={names}"])


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; scancel ignores jobs that have already ended. Raises `UserError` where it fails."""
    if not jobs:
        return
    result = _run("scancel", *jobs)
    if result.returncode and _FORGOTTEN not in result.stderr:
        raise UserError(f"scancel {' '.join(jobs)}: {' '.join(result.stderr.split())}")


def run_step(options: Sequence[str], script: str) -> int:
    """Run a script with bash as the tasks of a step of its own, on nodes that the `options` of srun request.

    The step inherits stdout and stderr. Returns srun's exit status. Raises `SilentError` where there is no SLURM.
    """
    try:
        return subprocess.run(["srun", *options, "bash", "-c", script], env=environment()).returncode
    except FileNotFoundError:
        raise SilentError("SLURM does not answer (no srun on this machine)") from None


def last_line(text: str) -> str:
    """The last line that a command of SLURM printed, without its prefixes."""
    lines = text.strip().splitlines()
    return (
        lines[-1].removeprefix("sbatch: error: ").removeprefix("allocation failure: ") if lines else "no reason given"
    )


def time_limit_seconds(text: str) -> int:
    """Seconds in one of SLURM's forms of a time limit: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises `ValueError`."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if not match:
        raise ValueError(text)
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = parts + [0] * (3 - len(parts))
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, parts + [0] * (2 - len(parts))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _seconds(left: str) -> float:
    """Seconds in squeue's remaining time, which is INVALID once it is over, and a word where there is no limit."""
    try:
        return time_limit_seconds(left)
    except ValueError:
        return 0 if left == "INVALID" else math.inf


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=environment(), capture_output=True, text=True)
    except FileNotFoundError:
        raise SilentError(f"SLURM does not answer (no {command[0]} on this machine)") from None


def _insist(command: list[str]) -> str:
    """The output of a command of SLURM, tried again until the controller answers."""
    deadline = time.monotonic() + _CONTROLLER_SECONDS
    while True:
        result = _run(*command)
        if result.returncode == 0:
            return result.stdout
        silent = _NO_ANSWER.search(result.stderr)
        if not silent or time.monotonic() > deadline:
            kind = SilentError if silent else UserError
            raise kind(f"{' '.join(command)}: {last_line(result.stderr)}")
        time.sleep(2)


def _answer(command: list[str], count: int, job: str) -> list[str]:
    """The fields of a job's line in squeue, whose first two (for ARRAY_TASK) or three are ids."""
    for fields in _fields(_insist(command), count):
        if job in (fields[0], fields[1], f"{fields[1]}_{fields[2]}"):
            return fields
    raise SilentError(f"squeue has no line for job {job}")


def _fields(text: str, count: int) -> Iterator[list[str]]:
    """The lines that have `count` fields; other lines, such as `CLUSTER: name`, are headings."""
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|", count - 1)]
        if len(fields) == count:
            yield fields
