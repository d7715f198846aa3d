"""Steering runs, chains, sweeps and sharding on a real SLURM."""

import os
from pathlib import Path

import pytest

from caduceus.run_directory import RunDirectory
from launch import history
from launch.history import attempts
from launch.overview import overview
from launch.submission import submissions
from tests.launch.test_shard import contents, shard_apart, shard_together, write_species
from tests.slurm.runs import (
    REQUEST,
    command,
    held,
    job_of,
    launch,
    losses,
    wait_for_end,
    wait_until_training,
    write_config,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, small_shards) -> Path:
    return write_config(tmp_path / "small.yaml", small_shards)


def runs(directory: Path, *arguments: str) -> str:
    done = command("runs", directory, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(directory: Path, *arguments: str) -> str:
    done = command("runs", directory, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    return done.stderr


def newest_job(run: Path) -> str:
    return submissions(RunDirectory(run))[-1].jobs[0]


def test_a_run_is_steered_through_all_its_states(slurm_cluster, config, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "small"
    waiting = launch(tmp_path, "--config", config, *REQUEST, "--nodes", "2", "--sbatch", "hold")
    assert f"python launch/runs.py status {Path('runs/small')}" in waiting.stdout
    assert "state       waiting: JobHeldUser" in runs(tmp_path, "status", "runs/small")
    assert "the run waits to start" in refused(tmp_path, "logs", "runs/small")
    assert f"is waiting (job {job_of(waiting)})" in refused(tmp_path, "resume", "runs/small")
    assert "taken out of the queue" in runs(tmp_path, "stop", "runs/small")
    assert "it is stopped" in refused(tmp_path, "cancel", "runs/small")

    def go_on(*arguments: str) -> str:
        runs(tmp_path, "resume", "runs/small", *arguments)
        job = newest_job(run)
        slurm_cluster.run("scontrol", "release", job)
        return job

    job = go_on()
    wait_until_training(run, 1)
    with held(run):
        status = runs(tmp_path, "status", "runs/small")
        assert "state       running" in status and "nodes       n[0-1]" in status and f"job         {job}" in status
        assert "ready to train" in runs(tmp_path, "logs", "runs/small")
        assert "Starting with JobEnvironment" in runs(tmp_path, "logs", "runs/small", "--rank", "1")
        assert "stops after its current step" in runs(tmp_path, "stop", "runs/small")
        assert "state       stopping" in runs(tmp_path, "status", "runs/small")
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    assert "state       stopped" in runs(tmp_path, "status", "runs/small")
    stopped_at = overview(RunDirectory(run))
    assert 0 < stopped_at.step == stopped_at.checkpoint < 40

    job = go_on("--nodes", "4")
    assert wait_until_training(run, 2).nodes == "n[0-3]"
    with held(run):
        assert "cancelled at step" in runs(tmp_path, "cancel", "runs/small")
    assert wait_for_end(slurm_cluster, job) == "CANCELLED"
    assert overview(RunDirectory(run)).state in ("cancelled", "lost")

    job = go_on("--nodes", "1")
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    assert launch(tmp_path, "--config", config, "--cluster", "debug", "run.dir=runs/alone").returncode == 0
    # fp32: sums over ranks in another order differ in the last bits.
    assert losses(run) == pytest.approx(losses(tmp_path / "runs" / "alone"), rel=1e-5)
    assert "is complete" in refused(tmp_path, "resume", "runs/small")
    table = runs(tmp_path, "list").splitlines()
    assert [line.split()[:3] for line in table[1:]] == [
        ["runs/alone", "complete", "40/40"],
        ["runs/small", "complete", "40/40"],
    ]
    monkeypatch.setenv("SLURM_CONF", os.devnull)  # SLURM does not answer any more
    status = runs(tmp_path, "status", "runs/small")
    assert "state       complete" in status and "ended with checkpoint" in status


def test_a_chain_goes_on_without_requeueing(slurm_cluster, config, tmp_path):
    run = tmp_path / "run"
    result = launch(tmp_path, "--config", config, *REQUEST, "--chain", "3", f"run.dir={run}")
    first, second, third = result.stdout.split("job:")[1].split("\n")[0].split()
    wait_until_training(run, 1)
    slurm_cluster.run("scancel", "--signal=USR2", first)
    assert wait_for_end(slurm_cluster, second) == "COMPLETED"
    found = attempts(RunDirectory(run))
    assert [(attempt.job, attempt.reason) for attempt in found] == [
        (first, history.SIGNAL),
        (second, history.COMPLETE),
    ]
    assert wait_for_end(slurm_cluster, third) == "CANCELLED"


def test_a_sweep_of_four_and_its_table(slurm_cluster, config, tmp_path):
    values = ["train.lr=1e-3,8e-3", "model.rcps=true,false"]
    sweep = ["--sweep", *values, "--time", "5"]
    request = [*REQUEST, "train.steps=3", "train.global_batch=1"]
    result = launch(tmp_path, "--config", config, *request, *sweep)
    assert result.returncode == 0, result.stderr
    jobs = result.stdout.split("jobs:")[1].split("\n")[0].split()
    assert jobs == [f"{jobs[0].split('_')[0]}_{number}" for number in range(4)]
    for job in jobs:
        assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    table = runs(tmp_path, "list", "runs/small-sweep").splitlines()
    names = [f"lr={lr},rcps={rcps}" for lr in ("1e-3", "8e-3") for rcps in ("false", "true")]
    assert [line.split()[:3] for line in table[1:]] == [
        [f"runs/small-sweep/{name}", "complete", "3/3"] for name in names
    ]
    configs = [RunDirectory(tmp_path / "runs" / "small-sweep" / name).config() for name in names]
    assert [(config.train.lr, config.model.rcps) for config in configs] == [
        (1e-3, False),
        (1e-3, True),
        (8e-3, False),
        (8e-3, True),
    ]


def test_sharding_as_an_array_gives_the_bytes_of_one_machine(slurm_cluster, tmp_path):
    species = write_species(tmp_path)
    together, apart = tmp_path / "together" / "data", tmp_path / "apart" / "data"
    apart.parent.mkdir()
    shard_together(species, together)
    printed = shard_apart(species, apart, *REQUEST)
    merging = printed.split("merged by job ")[1].split()[0]
    assert wait_for_end(slurm_cluster, merging) == "COMPLETED"
    assert contents(apart) == contents(together)
