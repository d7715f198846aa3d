"""What W&B is told of a run besides its rows, read back by its own protobuf from a start as a user makes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from caduceus.config import save_config
from caduceus.hub import load
from caduceus.monitor.wandb.facts import decisions, program_and_arguments
from caduceus.monitor.wandb.offline import read_records
from caduceus.run.directory import RunDirectory
from caduceus.run.events import read_events
from caduceus.run.provenance import COMMAND
from tests.conftest import REPOSITORY
from tests.train.conftest import SmallRun

JOB = {"job_id": "4711", "array_job_id": "4700", "array_task_id": "3", "restart_count": "2"}
JOB |= {"job_nodelist": "n[1-2]", "nnodes": "2", "job_partition": "long"}
"""What SLURM tells the processes of a job that was requeued twice."""


@pytest.mark.slow
def test_wandb_is_told_of_the_command_the_model_and_every_auto(small_run: SmallRun, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = small_run.config("run", train={"steps": 2}, valid={"every": 1}, wandb={"mode": "offline"})
    save_config(config, tmp_path / "given.yaml")
    command = ["-m", "caduceus.train", "--config", str(tmp_path / "given.yaml"), "wandb.notes=two words"]
    environment = os.environ | {f"SLURM_{name.upper()}": value for name, value in JOB.items()}
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=REPOSITORY, env=environment)
    run = RunDirectory.open(config.run.dir)
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    records = list(read_records(next(folder.glob("*.wandb"))))
    of_kind = {kind: [r for r in records if r.WhichOneof("record_type") == kind] for kind in ("environment", "metric")}
    environment = of_kind["environment"][0].environment
    assert environment.program == "-m caduceus.train" and list(environment.args) == command[2:]
    (told,) = [record.run.config.update for record in records if record.WhichOneof("record_type") == "run"]
    facts = json.loads(next(item.value_json for item in told if item.key == "start"))
    (start,) = run.starts()
    whole = facts | {"git_diff": start["git_diff"]}  # which is cut where much is uncommitted
    assert whole.items() >= start.items() and facts["starts"] == 1 and facts["auto"]["ops.backend"] == "cpu"
    assert start["command"] == f"python -m caduceus.train --config {command[3]} 'wandb.notes=two words'"
    assert start["parameters"] == sum(p.numel() for p in load(run.path).parameters())
    assert (start["ranks"], start["nodes"], start["gpus"]) == (1, 1, {})
    assert facts["slurm"] == JOB
    assert len(start["git_commit"]) == 40 and start["data_fingerprint"]
    summaries = {r.metric.name: r.metric.summary for r in of_kind["metric"]}
    assert next(event for event in read_events(run.path) if event["event"] == "start")["requeues"] == 2
    assert summaries["valid/loss"].min and summaries["valid/loss"].last and summaries["train/loss"].last


@pytest.mark.parametrize(
    ("command", "program", "arguments"),
    [
        ("python -m caduceus.train a=b", "-m caduceus.train", ["a=b"]),
        ("python launch/slurm.py --nodes 8 'run.name=a b'", "launch/slurm.py", ["--nodes", "8", "run.name=a b"]),
        ("caduceus-train", "caduceus-train", []),
    ],
)
def test_the_command_of_a_job_is_what_its_user_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, program: str, arguments: list[str]
) -> None:
    monkeypatch.setenv(COMMAND, command)  # as a job's first process has it from the launcher
    run = RunDirectory(tmp_path)
    assert program_and_arguments(run) == ("", []) and decisions(run) == {}
    run.write_provenance({})
    assert program_and_arguments(run) == (program, arguments)
    run.resolved_path.write_text("ops: [")
    assert decisions(run) == {}
