"""Steering runs, chains, sweeps and sharding on a real SLURM."""

import os
from pathlib import Path

import pytest

from caduceus.run.directory import RunDirectory
from launch import history
from launch.history import attempts, submissions
from launch.status import overview
from tests.conftest import write_random_fasta
from tests.launch.test_shard import contents, shard_apart, shard_together, write_species
from tests.slurm.small_runs import (
    REQUEST,
    STEPS,
    Setting,
    assert_undisturbed,
    command,
    held,
    job_of,
    runs,
    wait_for_end,
    wait_until,
    wait_until_training,
)

pytestmark = pytest.mark.slow


def refused(directory: Path, *arguments: str) -> str:
    done = command("runs", directory, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    return done.stderr


def newest_job(run: Path) -> str:
    return submissions(RunDirectory(run))[-1].jobs[0]


def a_run_is_steered_through_all_its_states(on: Setting) -> None:
    directory = on.directory
    run = directory / "runs" / "small"
    waiting = on.launch(*REQUEST, "--nodes", "2", "--sbatch", "hold", "train.micro_batch=2")
    assert f"python launch/runs.py status {Path('runs/small')}" in waiting.stdout
    assert "state       waiting: JobHeldUser" in runs(directory, "status", "runs/small")
    assert "the run waits to start; python launch/runs.py logs -f runs/small waits" in refused(
        directory, "logs", "runs/small"
    )
    assert f"is waiting (job {job_of(waiting)})" in refused(directory, "resume", "runs/small")
    assert "taken out of the queue" in runs(directory, "stop", "runs/small")
    assert "it is stopped" in refused(directory, "cancel", "runs/small")

    def go_on(*arguments: str) -> str:
        runs(directory, "resume", "runs/small", *arguments)
        job = newest_job(run)
        on.cluster.run("scontrol", "release", job)
        return job

    job = go_on()
    nodes = wait_until_training(run, 1).nodes
    with held(run):
        status = runs(directory, "status", "runs/small")
        assert "state       running" in status and f"nodes       {nodes}" in status and f"job         {job}" in status
        assert "ready to train" in runs(directory, "logs", "runs/small")
        assert "Starting with JobEnvironment" in runs(directory, "logs", "runs/small", "--rank", "1")
        assert "stops after its current step" in runs(directory, "stop", "runs/small")
        assert "state       stopping" in runs(directory, "status", "runs/small")
    assert wait_for_end(on.cluster, job) == "COMPLETED"
    assert "state       stopped" in runs(directory, "status", "runs/small")
    stopped_at = overview(RunDirectory(run))
    assert 0 < stopped_at.step == stopped_at.checkpoint < STEPS

    job = go_on("--nodes", "4", "train.micro_batch=1")
    assert wait_until_training(run, 2).nodes == "n[0-3]"
    with held(run):
        assert "cancelled at step" in runs(directory, "cancel", "runs/small")
    assert wait_for_end(on.cluster, job) == "CANCELLED"
    assert overview(RunDirectory(run)).state in ("cancelled", "lost")

    job = go_on("--nodes", "1")
    assert wait_for_end(on.cluster, job) == "COMPLETED"
    assert_undisturbed(run, on.undisturbed)
    assert "is complete" in refused(directory, "resume", "runs/small")
    [_, row] = runs(directory, "list").splitlines()
    assert row.split()[:3] == ["runs/small", "complete", f"{STEPS}/{STEPS}"]
    status = runs(directory, "status", "runs/small", SLURM_CONF=os.devnull)  # SLURM does not answer any more
    assert "state       complete" in status and "ended with checkpoint" in status


def a_chain_goes_on_without_requeueing(on: Setting) -> None:
    run = on.directory / "run"
    result = on.launch(*REQUEST, "--chain", "3", f"run.dir={run}")
    first, second, third = result.stdout.split("job:")[1].split("\n")[0].split()
    wait_until_training(run, 1)
    on.cluster.run("scancel", "--signal=USR2", first)
    assert wait_for_end(on.cluster, second) == "COMPLETED"
    found = attempts(RunDirectory(run))
    assert [(attempt.job, attempt.reason) for attempt in found] == [
        (first, history.Reason.SIGNAL),
        (second, history.Reason.COMPLETE),
    ]
    assert wait_for_end(on.cluster, third) == "CANCELLED"


def a_sweep_of_four_and_its_table(on: Setting) -> None:
    values = ["train.lr=1e-3,8e-3", "model.rcps=true,false"]
    sweep = ["--sweep", *values, "--time", "5"]
    request = [*REQUEST, "train.steps=3", "train.global_batch=1"]
    result = on.launch(*request, *sweep)
    assert result.returncode == 0, result.stderr
    jobs = result.stdout.split("jobs:")[1].split("\n")[0].split()
    assert jobs == [f"{jobs[0].split('_')[0]}_{number}" for number in range(4)]
    for job in jobs:
        assert wait_for_end(on.cluster, job) == "COMPLETED"
    table = runs(on.directory, "list", "runs/small-sweep").splitlines()
    names = [f"lr={lr},rcps={rcps}" for lr in ("1e-3", "8e-3") for rcps in ("false", "true")]
    assert [line.split()[:3] for line in table[1:]] == [
        [f"runs/small-sweep/{name}", "complete", "3/3"] for name in names
    ]
    configs = [RunDirectory(on.directory / "runs" / "small-sweep" / name).config() for name in names]
    assert [(config.train.lr, config.model.rcps) for config in configs] == [
        (1e-3, False),
        (1e-3, True),
        (8e-3, False),
        (8e-3, True),
    ]


def sharding_as_arrays_gives_the_bytes_of_one_machine(on: Setting) -> None:
    directory = on.directory
    species = write_species(directory)
    together, apart = directory / "together" / "data", directory / "apart" / "data"
    apart.parent.mkdir()
    write_random_fasta(directory / "c.fa", 3, {"chr1": 30_000})
    species.write_text(species.read_text() + "- {name: third, fasta: c.fa}\n")
    shard_together(species, together)
    request = [*REQUEST, "--task-bases", "10k"]
    printed = shard_apart(species, apart, *request)
    species_alone, shares, merging = printed.split("squeue -j ")[1].split()[0].split(",")
    on.cluster.run("scancel", shares)
    assert wait_for_end(on.cluster, merging) == "CANCELLED", "it waits for shares that never come"
    assert not (apart / "manifest.json").exists()
    for array in (species_alone, shares):  # the first goes on without the others
        active = ("squeue", "--noheader", f"--jobs={array}")
        wait_until(lambda active=active: on.cluster.run(*active).strip(), lambda jobs: not jobs, f"{array} to end")
    merging = shard_apart(species, apart, *request).split("merged by job ")[1].split()[0]
    assert wait_for_end(on.cluster, merging) == "COMPLETED"
    assert contents(apart) == contents(together)


SCENARIOS = [
    a_run_is_steered_through_all_its_states,
    a_chain_goes_on_without_requeueing,
    a_sweep_of_four_and_its_table,
    sharding_as_arrays_gives_the_bytes_of_one_machine,
]


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_among_other_runs(at_once, scenario):
    at_once[scenario].result()
