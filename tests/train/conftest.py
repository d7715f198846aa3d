"""A training run small enough for a test, and what its tests compare."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from caduceus.config import Config, config_from_dict, save_config
from caduceus.train.metrics import CLOCK_KEYS
from tests import preloaded

RECORDING_RUN = Path(__file__).parent / "recording_run.py"


class SmallRun:
    """Starts trainings of one small model on one small dataset, in this process or in one of their own."""

    def __init__(self, shards: Path, directory: Path) -> None:
        self.shards = shards
        self.directory = directory

    def config(self, name: str, **sections: dict[str, Any]) -> Config:
        values: dict[str, Any] = {
            "model": {"d_model": 16, "n_layer": 1, "d_state": 4, "rcps": True},
            "data": {"path": str(self.shards), "seq_len": 128, "workers": 0},
            "train": {"steps": 10, "global_batch": 8, "micro_batch": 4},
            "valid": {"every": 4, "samples": 8},
            "checkpoint": {"every": 3, "keep": 2},
            "run": {"dir": str(self.directory / name), "name": name, "device": "cpu"},
            "wandb": {"mode": "disabled"},
            "monitor": {"report": False, "windows": 0, "machine_seconds": 0.0},
        }
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys}
        return config_from_dict(values)

    def start(self, config: Config, consumed: Path | None = None) -> subprocess.Popen:
        """Train in another process; the sample numbers of each step go to the file `consumed`."""
        path = self.directory / f"{config.run.name}.yaml"
        save_config(config, path)
        command = [sys.executable, str(RECORDING_RUN), str(path), str(consumed or os.devnull)]
        # A run in this process leaves word of its W&B service, which the other would share.
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        return preloaded.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def small_run(small_shards: Path, tmp_path: Path) -> SmallRun:
    return SmallRun(small_shards, tmp_path)


def numbers(run_directory: str | Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in (Path(run_directory) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in rows]


def consumed_samples(path: Path) -> list[int]:
    """Sample numbers in the order of steps; of a step made twice, because a kill undid the first, the last counts."""
    steps = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        steps[row["step"]] = row["samples"]
    return [sample for step in sorted(steps) for sample in steps[step]]


def children_of(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for children in tasks for pid in children.read_text().split()]


def command_of(pid: int) -> bytes:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""
