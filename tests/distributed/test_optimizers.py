"""Muon, averages and rates by kind compute the same under every layout that takes them, and go on under another."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from caduceus.config import Config
from caduceus.hub import load
from caduceus.run.directory import RunDirectory
from tests.distributed.layouts import Layout, config_of, train_all

pytestmark = pytest.mark.slow

SINGLE = Layout("single", 1, {"strategy": "single"})
DDP = Layout("DDP 2", 2, {"strategy": "ddp"})
FSDP = Layout("FSDP 2", 2, {"strategy": "fsdp"})
CONTEXT = Layout("context 2", 2, {"strategy": "ddp", "context": 2})
STEPS, HALF = 6, 3
MUON = {"optimizer": "muon", "ema": 0.9, "lr_scale": {"A_log": 0.1}}
ADAMW = {**MUON, "optimizer": "adamw"}


def planned(shards: Path, directory: Path, name: str, layout: Layout, until: int, **train: object) -> Config:
    config = config_of(
        layout, shards, directory / name, steps=until, schedule="constant", precision="fp64", lr=4e-3, **train
    )
    config.run.allow_change = ["train.steps"]
    config.valid.every, config.valid.samples, config.monitor.windows = HALF, 4, 0
    return config


@pytest.fixture(scope="module")
def directory(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with Muon and with AdamW: single, on each layout, and of each layout one that goes on from single's half."""
    directory = tmp_path_factory.mktemp("optimizers")
    moves = {("muon", "DDP"): (MUON, DDP), ("muon", "context"): (MUON, CONTEXT)}
    moves |= {("adamw", "DDP"): (ADAMW, DDP), ("adamw", "FSDP"): (ADAMW, FSDP)}
    alone = [planned(small_shards, directory, "muon single", SINGLE, STEPS, **MUON)]
    alone += [planned(small_shards, directory, "adamw single", SINGLE, STEPS, **ADAMW)]
    together = []
    for (kind, name), (train, layout) in moves.items():
        alone.append(planned(small_shards, directory, f"{kind} {name} moved", SINGLE, HALF, **train))
        together.append(planned(small_shards, directory, f"{kind} {name} moved", layout, STEPS, **train))
        together.append(planned(small_shards, directory, f"{kind} {name}", layout, STEPS, **train))
    for world, configs in ((1, alone), (2, together)):
        for of_ranks in train_all(world, configs):
            assert [rank.refusal for rank in of_ranks] == [None] * world
    return directory


def rows(directory: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("moved", ["", " moved"])
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("muon DDP", 1e-9), ("muon context", 1e-9), ("adamw DDP", 1e-9), ("adamw FSDP", 1e-9)],
)
def test_losses_are_those_of_one_process(directory: Path, name: str, tolerance: float, moved: str) -> None:
    expected, found = rows(directory, f"{name.split()[0]} single"), rows(directory, f"{name}{moved}")
    for key in ("loss", "valid_loss", "valid_loss_ema"):
        values = [row[key] for row in expected if key in row]
        assert len(values) == {"loss": STEPS}.get(key, STEPS // HALF)
        assert [row[key] for row in found if key in row] == pytest.approx(values, rel=tolerance)


def test_averages_of_sharded_weights_are_exported(directory: Path) -> None:
    averaged = load(directory / "adamw FSDP").state_dict()
    for name, weight in load(directory / "adamw single").state_dict().items():
        torch.testing.assert_close(averaged[name], weight, rtol=1e-6, atol=1e-8)
    checkpoint = RunDirectory(directory / "adamw FSDP").newest_valid_checkpoint()
    state = {"model": {"embedding.weight": torch.empty_like(averaged["embedding.weight"])}}
    dcp.load(state, checkpoint_id=checkpoint.path, no_dist=True)
    assert not torch.equal(state["model"]["embedding.weight"], averaged["embedding.weight"])
