"""The commands without a cluster: a directory to start them in, and a SLURM that only notes what it is asked."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import runs, slurm

Command = Callable[..., int]


@pytest.fixture
def launch(monkeypatch, tmp_path) -> Command:
    """launch/slurm.py in an empty directory, on a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(shutil.which("git"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return _command(monkeypatch, slurm, "slurm.py")


@pytest.fixture
def steer(monkeypatch) -> Command:
    """launch/runs.py."""
    return _command(monkeypatch, runs, "runs.py")


@pytest.fixture
def small_config(tmp_path, small_shards) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: {d_model: 16, n_layer: 2, d_state: 4, rcps: true}\n"
        f"data: {{path: {small_shards}, seq_len: 128, workers: 0}}\n"
        "train: {steps: 4, global_batch: 8, micro_batch: 2}\n"
        "valid: {every: 0}\n"
        "checkpoint: {every: 2}\n"
        "run: {device: cpu}\n"
        "wandb: {mode: disabled}\n"
        "monitor: {report: false, windows: 0}\n"
    )
    return str(path)


class FakeSlurm:
    """Commands on PATH that answer as told: a job submitted to it never starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answer("sinfo", "echo 'main*|up|idle|64|64|1000000|gpu:8|infinite'")
        self.answer("squeue", "exit 0")
        self.answer("srun", "exit 0")
        self.answer("sbatch", 'case "$*" in *--test-only*) exit 0;; esac; echo "Submitted batch job 7"')

    def answer(self, command: str, script: str) -> None:
        path, told = self.folder / command, self.folder / f"{command}.answer"
        new = told.with_suffix(".new")
        new.write_text(f'echo {command} "$@" >> {self.folder / "asked"}\n{script}\n')
        new.replace(told)
        if not path.exists():  # never written again: a process forked meanwhile would hold it open, "Text file busy"
            path.write_text(f"#!/bin/sh\n. {told}\n")
            path.chmod(0o755)

    def shows(self, **facts: object) -> None:
        """Let squeue tell of job 7 what launch.scheduler asks for at its end."""
        job = {
            "state": "RUNNING",
            "left": "UNLIMITED",
            "excluded": "",
            "reason": "None",
            "restarts": 0,
            "preempted": "",
            "nodes": "n0",
        } | facts
        own = "7|7_N/A|{state}|{left}|{excluded}|{reason}".format(**job)
        starts = "7|7|N/A|{restarts}|{preempted}|".format(**job)
        cases = f"*RestartCnt*) echo '{starts}';; *%N) echo '7|7_N/A|{job['nodes']}';; *) echo '{own}';;"
        self.answer("squeue", f'case "$*" in {cases} esac')

    def asked(self, command: str) -> list[str]:
        """The arguments of each call of a command, save those of sbatch that submit nothing."""
        log = self.folder / "asked"
        calls = [line for line in log.read_text().splitlines() if "--test-only" not in line] if log.exists() else []
        return [line.removeprefix(f"{command} ") for line in calls if line.split()[0] == command]


@pytest.fixture
def fake_slurm(launch, monkeypatch, tmp_path) -> FakeSlurm:
    monkeypatch.setattr("launch.submission.PACKAGES", ("launch",))  # nothing starts that would need the others
    return FakeSlurm(tmp_path / "bin")


def _command(monkeypatch: pytest.MonkeyPatch, module, name: str) -> Command:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return module.main()

    return run
