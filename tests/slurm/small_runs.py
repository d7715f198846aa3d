"""Small training runs through the launcher, and what happens to them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from caduceus.run.directory import RunDirectory
from launch.history import Attempt, attempts
from tests.conftest import REPOSITORY
from tests.slurm.cluster import Cluster

T = TypeVar("T")

STEPS = 40
PATIENCE = 300
"""Seconds after which a test gives up: a busy machine needs a minute to start a few processes with torch."""
ENDLESS = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED")
REQUEST = ["--cluster", "cpu", "--cpus-per-task", "1", "--mem", "500M"]


@dataclass(frozen=True)
class Setting:
    """Where a scenario takes place: on a cluster that it shares with others, in a directory of its own."""

    cluster: Cluster
    config: Path
    undisturbed: list[float]
    directory: Path

    def launch(self, *arguments: object) -> subprocess.CompletedProcess:
        return launch(self.directory, "--config", self.config, *arguments)


def write_config(path: Path, shards: Path, **sections: str) -> Path:
    """A configuration of a tiny model whose steps are slow enough (about 0.1 s) to be disturbed in their midst."""
    values = {
        "model": "{d_model: 16, n_layer: 1, d_state: 4}",
        "data": f"{{path: {shards}, seq_len: 64, workers: 0}}",
        "train": f"{{steps: {STEPS}, global_batch: 4, micro_batch: 1}}",
        "ops": "{backend: naive}",
        "valid": "{every: 0}",
        "checkpoint": "{every: 10}",
        "run": "{device: cpu}",
        "wandb": "{mode: disabled}",
        "monitor": "{report: false, windows: 0}",
    }
    path.write_text("".join(f"{name}: {value}\n" for name, value in (values | sections).items()))
    return path


def command(script: str, directory: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run launch/SCRIPT.py in a directory."""
    line = [sys.executable, str(REPOSITORY / "launch" / f"{script}.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(line, cwd=directory, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def launch(directory: Path, *arguments: object) -> subprocess.CompletedProcess:
    return command("slurm", directory, *arguments)


def runs(directory: Path, *arguments: object, **environment: str) -> str:
    """What launch/runs.py prints."""
    done = command("runs", directory, *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def job_of(result: subprocess.CompletedProcess) -> str:
    """The first job of a submission."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split("job:")[1].split()[0]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    wait_until(condition, bool, what)


def wait_until(ask: Callable[[], T], enough: Callable[[T], object], what: str) -> T:
    """Ask until an answer is enough, and return it; after `PATIENCE` the test fails with the last one.

    Asking takes a tenth of the time: each question to SLURM starts a process, which the runs would have to wait for.
    """
    began = asked = time.monotonic()
    while not enough(answer := ask()):
        assert asked < began + PATIENCE, f"waited {PATIENCE} s for {what}; at last: {answer!r}"
        time.sleep(min(max(0.2, 10 * (time.monotonic() - asked)), 2))
        asked = time.monotonic()
    return answer


def state_of(cluster: Cluster, job: str) -> str:
    """The state of a job as squeue gives it; empty where SLURM has forgotten it."""
    return cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()


def wait_for_end(cluster: Cluster, job: str) -> str:
    """The state in which a job ended."""
    return wait_until(lambda: state_of(cluster, job), lambda state: state and state not in ENDLESS, f"job {job} to end")


def wait_until_training(run: Path, start: int) -> Attempt:
    """Wait until the run's n-th start (from 1) has made a step of its own."""

    provenance = RunDirectory(run).provenance_path

    def trains() -> bool:
        found = attempts(RunDirectory(run))
        if len(found) < start or not found[-1].started or not provenance.exists():
            return False
        # Written once the rows that an earlier attempt made after its last checkpoint are gone.
        begun = json.loads(provenance.read_text())["starts"][-1]["time"]
        return begun >= found[-1].started and last_step(run) > found[-1].step

    wait_for(trains, f"start {start} of {run}")
    return attempts(RunDirectory(run))[-1]


def last_step(run: Path) -> int:
    rows = RunDirectory(run).metrics()
    return rows[-1]["step"] if rows else 0


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("valid_loss")) for row in rows]


def assert_undisturbed(run: Path, undisturbed: list[float]) -> None:
    """Each sample counted once, and the losses of the single process."""
    rows = RunDirectory(run).metrics()
    assert [(row["step"], row["samples"]) for row in rows] == [(step, 4 * step) for step in range(1, STEPS + 1)]
    # fp32: sums over ranks in another order differ in the last bits.
    assert losses(run) == pytest.approx(undisturbed, rel=1e-5)


def reasons(run: Path) -> list[str | None]:
    """Why each attempt of a run ended."""
    return [attempt.reason for attempt in attempts(RunDirectory(run))]


def hosts(cluster: Cluster, names: str) -> list[str]:
    """The nodes in SLURM's short form of a list, such as n[0-1]."""
    return cluster.run("scontrol", "show", "hostnames", names).split()


def process_of(run: Path, rank: int) -> int:
    """Process id of a rank of the run's job, on SLURM or on this machine."""
    of_rank = {f"SLURM_PROCID={rank}".encode(), f"SUBMITIT_LOCAL_GLOBALID={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        is_task = b"submitit.core._submit" in line and not line[0].endswith(b"srun")
        if is_task and str(run / "logs").encode() in line and of_rank & set(environment):
            return int(process.name)
    raise AssertionError(f"{run} has no process of rank {rank}")


@contextlib.contextmanager
def held(run: Path, rank: int = 0) -> Iterator[int]:
    """Keep a rank, and with it the run, from going on meanwhile; yields its process id."""
    pid = process_of(run, rank)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def has_pending_signal(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a stopped process."""
    rows = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return bool((int(rows["SigPnd"], 16) | int(rows["ShdPnd"], 16)) >> (number - 1) & 1)
