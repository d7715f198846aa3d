"""Strategies of many ranks on one process, started without torchrun: what a run on fewer machines goes on with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from caduceus.config import Config, save_config
from caduceus.run.directory import RunDirectory
from tests.distributed.layouts import Layout, config_of, train_all

pytestmark = pytest.mark.slow

STEPS = {"steps": 4, "lr": 4e-3}
STRATEGIES = {
    "single": {"strategy": "single"},
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "fsdp offloaded": {"strategy": "fsdp", "cpu_offload": True},
    "ZeRO 1": {"strategy": "deepspeed", "zero_stage": 1},
    "ZeRO 3": {"strategy": "deepspeed", "zero_stage": 3},
}
FROM_TWO = ["ddp", "fsdp"]
TRAIN_ALL = """
import sys
from caduceus.config import load_config
from caduceus.train.trainer import train
for path in sys.argv[1:]:
    assert train(load_config(path)) == 0
"""


def train_alone(configs: list[Config]) -> None:
    """Runs one after another in a process that knows of no other."""
    paths = [Path(config.run.dir).with_suffix(".yaml") for config in configs]
    for path, config in zip(paths, configs, strict=True):
        save_config(config, path)
    absent = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in absent} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN_ALL, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "Grad strides" not in result.stderr, result.stderr


@pytest.fixture(scope="module")
def losses(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """By strategy, and of runs that two ranks began."""
    directory = tmp_path_factory.mktemp("one")
    begun = [
        config_of(
            Layout("", 2, STRATEGIES[name]), small_shards, directory / f"{name} from two", **{**STEPS, "steps": 2}
        )
        for name in FROM_TWO
    ]
    train_all(2, begun)
    configs = {
        name: config_of(Layout("", 1, parallel), small_shards, directory / name, **STEPS)
        for name, parallel in STRATEGIES.items()
    }
    for name in FROM_TWO:
        config = config_of(Layout("", 1, STRATEGIES[name]), small_shards, directory / f"{name} from two", **STEPS)
        config.run.allow_change = ["train.steps"]
        configs[f"{name} from two"] = config
    apart = configs["ZeRO 3"]  # DeepSpeed keeps groups of ranks beyond the run that made them
    train_alone([config for config in configs.values() if config is not apart])
    train_alone([apart])
    return {name: [row["loss"] for row in RunDirectory(config.run.dir).metrics()] for name, config in configs.items()}


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "single"])
def test_a_strategy_of_many_ranks_trains_on_one(losses: dict[str, list[float]], name: str) -> None:
    assert losses[name] == pytest.approx(losses["single"], rel=1e-5)


@pytest.mark.parametrize("name", FROM_TWO)
def test_a_run_goes_on_from_two_ranks_to_one(losses: dict[str, list[float]], name: str) -> None:
    assert len(losses[f"{name} from two"]) == STEPS["steps"]
