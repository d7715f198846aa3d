"""Every optimizer, averages and rates by kind compute the same on several ranks, and go on under another layout."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from caduceus.config import KEYS, Config
from caduceus.hub import load
from caduceus.run.directory import RunDirectory
from tests.distributed.layouts import Layout, config_of, train_all

pytestmark = pytest.mark.slow

SINGLE = Layout("single", 1, {"strategy": "single"})
DDP = Layout("DDP 2", 2, {"strategy": "ddp"})
FSDP = Layout("FSDP 2", 2, {"strategy": "fsdp"})
CONTEXT = Layout("context 2", 2, {"strategy": "ddp", "context": 2})
STEPS, HALF = 6, 3
OPTIMIZERS = KEYS["train.optimizer"].choices
MOVES = [*((name, DDP) for name in OPTIMIZERS), ("muon", CONTEXT), ("adamw", FSDP)]
"""Optimizers, each under what it is tried on two ranks."""


def planned(shards: Path, run: Path, layout: Layout, until: int, optimizer: str) -> Config:
    train = {"optimizer": optimizer, "ema": 0.9, "lr_scale": {"A_log": 0.1}, "lr": 4e-3}
    config = config_of(layout, shards, run, steps=until, schedule="constant", precision="fp64", **train)
    config.run.allow_change = ["train.steps"]
    config.valid.every, config.valid.samples, config.monitor.windows = HALF, 4, 0
    return config


@pytest.fixture(scope="module")
def directory(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each optimizer: single, under its layouts, and for each of them one that goes on from single's half."""
    directory = tmp_path_factory.mktemp("optimizers")
    alone = [planned(small_shards, directory / f"{name} single", SINGLE, STEPS, name) for name in OPTIMIZERS]
    together = []
    for name, layout in MOVES:
        run = directory / f"{name} {layout.name}"
        moved = run.with_name(f"{run.name} moved")
        alone.append(planned(small_shards, moved, SINGLE, HALF, name))
        together += [planned(small_shards, moved, layout, STEPS, name), planned(small_shards, run, layout, STEPS, name)]
    for world, configs in ((1, alone), (2, together)):
        for of_ranks in train_all(world, configs):
            assert [rank.refusal for rank in of_ranks] == [None] * world
    return directory


def rows(directory: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("moved", ["", " moved"])
@pytest.mark.parametrize(("name", "layout"), MOVES, ids=lambda value: getattr(value, "name", value))
def test_losses_are_those_of_one_process(directory: Path, name: str, layout: Layout, moved: str) -> None:
    expected, found = rows(directory, f"{name} single"), rows(directory, f"{name} {layout.name}{moved}")
    for key in ("loss", "valid_loss", "valid_loss_ema"):
        values = [row[key] for row in expected if key in row]
        assert len(values) == {"loss": STEPS}.get(key, STEPS // HALF)
        assert [row[key] for row in found if key in row] == pytest.approx(values, rel=1e-9)


def test_averages_of_sharded_weights_are_exported(directory: Path) -> None:
    averaged = load(directory / "adamw FSDP 2").state_dict()
    for name, weight in load(directory / "adamw single").state_dict().items():
        torch.testing.assert_close(averaged[name], weight, rtol=1e-6, atol=1e-8)
    checkpoint = RunDirectory(directory / "adamw FSDP 2").newest_valid_checkpoint()
    state = {"model": {"embedding.weight": torch.empty_like(averaged["embedding.weight"])}}
    dcp.load(state, checkpoint_id=checkpoint.path, no_dist=True)
    assert not torch.equal(state["model"]["embedding.weight"], averaged["embedding.weight"])
