"""Real ranks, one of which fails before the first step: the innocent ones are told apart by type, and the run lives."""

import os
from pathlib import Path

import pytest

from caduceus.errors import Kind
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import End, ends_folder, read_ends
from launch.history import Attempt, attempts
from tests.slurm.small_runs import command, write_config

pytestmark = pytest.mark.slow

A_WORKER, THE_RANK = "os.getpid()", "os.getppid()"
STRIKE = """
import os, signal

def strike():
    if os.environ.get("RANK") == "1":
        os.kill({victim}, signal.SIGKILL)

os.register_at_fork(after_in_child=strike)
"""
"""Strikes when rank 1 forks the first worker of its loader."""


def ends_of(directory: Path, shards: Path, victim: str, *arguments: str) -> tuple[Attempt, dict[int, End], int]:
    """The attempt of a local job of two ranks, the ends of its ranks, and the steps that it made."""
    (directory / "sitecustomize.py").write_text(STRIKE.format(victim=victim))
    data = f"{{path: {shards}, seq_len: 64, workers: 1}}"
    config = write_config(directory / "small.yaml", shards, data=data, model="{d_model: 16, n_layer: 1, rcps: true}")
    request = ["--config", config, "--cluster", "local", "--tasks-per-node", "2", "run.dir=run", *arguments]
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    done = command("slurm", directory, *request, PYTHONPATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    run = RunDirectory(directory / "run")
    [attempt] = attempts(run)
    return attempt, read_ends(ends_folder(run.path, attempt.job, 0)), len(run.metrics())


@pytest.mark.parametrize("shared", ["parallel.context=2", "parallel.strands=2"])
def test_a_killed_worker_makes_its_peer_no_culprit(small_shards, tmp_path, shared):
    attempt, ends, steps = ends_of(tmp_path, small_shards, A_WORKER, shared)
    assert steps == 0 and not attempt.refused and "RuntimeError: DataLoader worker" in attempt.error
    assert (ends[1].kind, ends[0].kind) == (Kind.CRASH, Kind.PEER)
    assert (ends[0].peer, ends[0].peer_kind) == (1, Kind.CRASH)
    assert "failed: RuntimeError: DataLoader worker" in ends[0].message


def test_nor_does_a_killed_rank(small_shards, tmp_path):
    attempt, ends, steps = ends_of(tmp_path, small_shards, THE_RANK, "parallel.context=2")
    assert steps == 0 and not attempt.refused
    assert ends.keys() == {0} and (ends[0].kind, ends[0].peer) == (Kind.PEER, None)
    assert "lost contact with another rank" in ends[0].message
