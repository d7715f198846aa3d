"""Runs on a real SLURM come back by themselves, and end as if nothing had happened."""

import os
import signal
from pathlib import Path

import pytest

from caduceus.run_directory import RunDirectory
from launch import history
from launch.history import attempts
from tests.slurm.runs import (
    REQUEST,
    has_pending_signal,
    held,
    job_of,
    last_step,
    launch,
    losses,
    process_of,
    wait_for,
    wait_for_end,
    wait_until_training,
    write_config,
)

pytestmark = pytest.mark.slow

STEPS = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory, small_shards) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "small.yaml", small_shards)


@pytest.fixture(scope="module")
def undisturbed(config) -> list[float]:
    """Losses of the run in one process."""
    assert launch(config.parent, "--config", config, "--cluster", "debug", "run.dir=alone").returncode == 0
    return losses(config.parent / "alone")


def assert_undisturbed(run: Path, undisturbed: list[float]) -> None:
    """Each sample counted once, and the losses of the single process."""
    rows = RunDirectory(run).metrics()
    assert [(row["step"], row["samples"]) for row in rows] == [(step, 4 * step) for step in range(1, STEPS + 1)]
    # fp32: sums over ranks in another order differ in the last bits.
    assert losses(run) == pytest.approx(undisturbed, rel=1e-5)


def reasons(run: Path) -> list[str | None]:
    return [attempt.reason for attempt in attempts(RunDirectory(run))]


def test_signal_requeue_and_a_killed_rank(slurm_cluster, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = job_of(launch(tmp_path, "--config", config, *REQUEST, "--nodes", "2", f"run.dir={run}"))
    wait_until_training(run, 1)
    slurm_cluster.run("scancel", "--signal=USR2", job)
    wait_until_training(run, 2)
    slurm_cluster.run("scontrol", "requeue", job)
    wait_until_training(run, 3)
    os.kill(process_of(run, rank=1), signal.SIGKILL)
    wait_until_training(run, 4)
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    signalled, requeued, *others = reasons(run)
    assert signalled == history.SIGNAL and others == [history.FAILED, history.COMPLETE]
    assert requeued in (history.TAKEN, history.LOST), "SLURM's KillWait may be too short for the last lines"
    killed = attempts(RunDirectory(run))[2]
    assert "Killed" in killed.error and not killed.gave_up
    assert_undisturbed(run, undisturbed)


def test_a_dead_node_and_a_dead_controller(slurm_cluster, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    job = job_of(launch(tmp_path, "--config", config, *REQUEST, "--nodes", "2", f"run.dir={run}"))
    wait_until_training(run, 1)
    slurm_cluster.kill("slurmctld")
    rank = process_of(run, rank=1)
    os.kill(rank, signal.SIGKILL)  # now the batch script wants to requeue, and nobody answers
    wait_for(lambda: reasons(run) == [history.FAILED] or not Path(f"/proc/{rank}").exists(), "the rank's death")
    slurm_cluster.start_controller()
    second = wait_until_training(run, 2, seconds=90)
    assert second.nodes == "n[0-1]"
    slurm_cluster.kill_node("n1")
    third = wait_until_training(run, 3, seconds=90)
    assert "n1" not in slurm_nodes(slurm_cluster, third.nodes)
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    assert reasons(run)[-1] == history.COMPLETE
    assert_undisturbed(run, undisturbed)


def test_the_time_limit(slurm_cluster, config, undisturbed, tmp_path):
    preset = tmp_path / "one-minute.yaml"
    preset.write_text("executor: slurm\ncpus_per_task: 1\nmem: 500M\ntime: '1'\nsignal_seconds: 10\n")
    run = tmp_path / "run"
    job = job_of(launch(tmp_path, "--config", config, "--cluster", preset, "--nodes", "2", f"run.dir={run}"))
    wait_until_training(run, 1)
    log = run / "logs" / f"{job}_0_log.out"
    with held(run) as rank:  # so that the run is not over before its time is up
        assert last_step(run) < STEPS
        wait_for(
            lambda: has_pending_signal(rank, signal.SIGUSR2) or "SIGUSR2" in log.read_text(),
            "SLURM's signal before the time limit",
        )
    wait_until_training(run, 2)
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    assert set(reasons(run)[:-1]) == {history.TIME_LIMIT} and reasons(run)[-1] == history.COMPLETE
    assert_undisturbed(run, undisturbed)


def test_a_run_that_fails_at_the_same_step_is_given_up(slurm_cluster, config, tmp_path):
    run = tmp_path / "run"
    diverging = ["train.lr=1e30", "train.warmup_steps=0", "train.max_skipped_steps=0", "checkpoint.every=100"]
    job = job_of(launch(tmp_path, "--config", config, *REQUEST, f"run.dir={run}", *diverging))
    assert wait_for_end(slurm_cluster, job) == "FAILED"
    assert reasons(run) == [history.FAILED] * 3
    assert [attempt.gave_up for attempt in attempts(RunDirectory(run))] == [False, False, True]
    log = (run / "logs" / f"{job}_0_log.out").read_text()
    assert "given up after 3 failures without a new checkpoint; the last one: train.max_skipped_steps: loss" in log


def test_a_bad_node_is_left_out(slurm_cluster, config, tmp_path):
    run = tmp_path / "run"
    prolog = tmp_path / "prolog.sh"
    prolog.write_text("#!/bin/sh\n[ $SLURMD_NODENAME = n0 ] && echo export SLURM_TMPDIR=/proc/none\nexit 0\n")
    prolog.chmod(0o755)
    request = [*REQUEST, "--nodes", "2", f"--srun=--task-prolog={prolog}", "train.steps=2", f"run.dir={run}"]
    job = job_of(launch(tmp_path, "--config", config, *request))
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    first, second = attempts(RunDirectory(run))
    assert (first.nodes, first.reason, first.bad_nodes) == ("n[0-1]", history.BAD_NODE, ["n0"])
    assert "/proc/none" in first.error
    assert (second.nodes, second.reason) == ("n[1-2]", history.COMPLETE)


def slurm_nodes(cluster, names: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", names).split()
