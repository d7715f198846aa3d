"""Training runs through the launcher on a real SLURM."""

import sys
from pathlib import Path

import numpy as np
import pytest

from caduceus.errors import UserError
from launch import slurm
from tests.evaluate.conftest import model_folder
from tests.launch.test_evaluate import write_sequences
from tests.slurm.small_runs import REQUEST, command, job_of, launch, losses, wait_for_end

__all__ = ["model_folder"]
pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, small_shards) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: {d_model: 16, n_layer: 2, d_state: 4, rcps: true}\n"
        f"data: {{path: {small_shards}, seq_len: 128, workers: 0}}\n"
        "train: {steps: 10, global_batch: 8, micro_batch: 2}\n"
        "valid: {every: 4, samples: 8}\n"
        "checkpoint: {every: 3}\n"
        "wandb: {mode: disabled}\n"
        "monitor: {report: false, windows: 0}\n"
    )
    return path


def test_runs_on_several_nodes_equal_the_single_process(slurm_cluster, config, tmp_path):
    # First, so that the CPU kernels are compiled once, and the jobs get them with the code.
    assert launch(tmp_path, "--config", config, "--cluster", "debug", "run.dir=alone").returncode == 0
    request = ["--config", config, *REQUEST]
    two = launch(tmp_path, *request, "--nodes", "2", "--tasks-per-node", "2", "run.dir=two")
    again = launch(tmp_path, *request, "--nodes", "2", "--tasks-per-node", "2", "run.dir=two")
    assert again.returncode == 2 and f"two is in use by job {job_of(two)}" in again.stderr
    four = launch(tmp_path, *request, "--nodes", "4", "run.dir=four")
    for job, run in ((job_of(two), "two"), (job_of(four), "four")):
        assert wait_for_end(slurm_cluster, job) == "COMPLETED"
        # fp32: sums over ranks in another order differ in the last bits.
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition", "gpu"], "no partition 'gpu' here; choose one of main, urgent"),
        (["--gpus-per-node", "4"], "gpus_per_node: 4 GPUs asked for, but a node has at most 2"),
        (["--nodes", "5", "train.global_batch=10"], "nodes: 5 asked for, but a partition has at most 4"),
        (["--time", "3-0"], "time: 3-0 asked for, but the partition's limit is 1-00:00:00"),
        (["--mem", "1T"], "SLURM refuses the job: "),
    ],
)
def test_what_slurm_would_refuse_is_refused_before_submitting(slurm_cluster, config, monkeypatch, arguments, message):
    monkeypatch.chdir(config.parent)
    command = ["slurm.py", "--config", str(config), "--cluster", "cpu", "--cpus-per-task", "1", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match=message) as error:
        slurm.main()
    assert "\n" not in str(error.value)
    assert slurm_cluster.run("squeue", "--noheader") == ""


def test_sbatch_accepts_the_dry_run_script(slurm_cluster, config, tmp_path):
    request = ["--cluster", "slurm", "--nodes", "2", "--gpus-per-node", "2", "--cpus-per-task", "2", "--dry-run"]
    request += ["--sbatch", "exclusive", "--sbatch", "comment=two words"]
    result = launch(tmp_path, "--config", config, *request)
    assert result.returncode == 0 and "would be refused" not in result.stderr
    script = tmp_path / "script.sh"
    script.write_text(result.stdout[result.stdout.index("#!/bin/bash") : result.stdout.index("# runs/small/")])
    slurm_cluster.run("sbatch", "--test-only", str(script))


def test_nodes_are_checked_before_a_run(slurm_cluster, config, tmp_path):
    done = launch(tmp_path, "--check", "--nodes", 2, *REQUEST, f"run.dir={tmp_path}/runs/x")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("2 ranks on 2 nodes: n") and "all ranks, 2 ranks: all-reduce" in done.stdout
    assert "\n0 wrong, " in done.stdout


def test_an_evaluation_is_a_job_whose_ranks_share_it(slurm_cluster, tmp_path, model_folder):
    write_sequences(tmp_path / "in.csv", 4100)
    words = ["embed", "--model", model_folder("ps"), "--input", "in.csv"]
    assert command("evaluate", tmp_path, *words, "--out", "one.npz", "--cluster", "debug").returncode == 0
    request = [*words, "--out", "two.npz", *REQUEST, "--nodes", "2"]
    first, again = command("evaluate", tmp_path, *request), command("evaluate", tmp_path, *request)
    assert again.returncode == 2 and f"two.npz is being written by job {job_of(first)}; wait" in again.stderr
    assert wait_for_end(slurm_cluster, job_of(first)) == "COMPLETED"
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["embeddings"], two["embeddings"])
