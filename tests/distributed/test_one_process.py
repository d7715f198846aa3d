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


def train_alone(config: Config) -> list[float]:
    """Losses of a run by `python -m caduceus.train`."""
    path = Path(config.run.dir).with_suffix(".yaml")
    save_config(config, path)
    absent = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in absent} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "caduceus.train", "--config", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "Grad strides" not in result.stderr, result.stderr
    return [row["loss"] for row in RunDirectory(config.run.dir).metrics()]


@pytest.fixture(scope="module")
def expected(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    layout = Layout("", 1, {"strategy": "single"})
    return train_alone(config_of(layout, small_shards, tmp_path_factory.mktemp("one") / "single", **STEPS))


@pytest.mark.parametrize(
    "parallel",
    [
        {"strategy": "ddp"},
        {"strategy": "fsdp"},
        {"strategy": "fsdp", "cpu_offload": True},
        {"strategy": "deepspeed", "zero_stage": 1},
        {"strategy": "deepspeed", "zero_stage": 3},
    ],
    ids=lambda parallel: "-".join(map(str, parallel.values())),
)
def test_a_strategy_of_many_ranks_trains_on_one(
    small_shards: Path, tmp_path: Path, expected: list[float], parallel: dict
) -> None:
    layout = Layout("", 1, parallel)
    assert train_alone(config_of(layout, small_shards, tmp_path / "run", **STEPS)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_from_two_ranks_to_one(small_shards: Path, tmp_path: Path, strategy: str) -> None:
    two, one = (Layout("", world, {"strategy": strategy}) for world in (2, 1))
    train_all(2, [config_of(two, small_shards, tmp_path / "run", **{**STEPS, "steps": 2})])
    config = config_of(one, small_shards, tmp_path / "run", **STEPS)
    config.run.allow_change = ["train.steps"]
    assert len(train_alone(config)) == 4
