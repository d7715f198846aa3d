"""Runs whose passes are recorded and replayed train the same bits, on a CPU (tests/distributed/graphs.py)."""

import shutil
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caduceus.config import Config, checks
from caduceus.distributed import build, captured
from caduceus.errors import UserError
from caduceus.ops import cpu
from caduceus.run.directory import RunDirectory
from caduceus.train import setup
from caduceus.train.trainer import train
from tests.distributed.graphs import Graph, replay_on_cpu
from tests.distributed.ranks import on_ranks
from tests.train.conftest import SmallRun, numbers

STEPS = 4


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, ignore_label: int
) -> tuple[Tensor, Tensor]:
    """As in the GPU's kernel, no shape depends on which bases are labelled."""
    logits = (hidden @ weight[:, None].mT).sum(0)
    losses = F.cross_entropy(logits.mT.float(), labels, reduction="none", ignore_index=ignore_label)
    weights = (labels != ignore_label).float() * (1 if loss_weights is None else loss_weights)
    return (losses * weights).sum(-1), weights.sum(-1)


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> list[Graph]:
    """Lets a CPU record; the graphs that it did, one after another."""
    patch.setattr(cpu, "head_cross_entropy", head_cross_entropy, raising=False)
    modules: list[ModuleType] = [build, checks, setup]
    for module in modules:
        patch.setattr(module, "refuse_cuda_graphs", lambda config: None)
    return replay_on_cpu(patch)


def config_of(small_run: SmallRun, name: str, graphs: str, **train: object) -> Config:
    """Two micro-batches in a step; every second step is told from within, validated and saved."""
    config = small_run.config(
        name,
        train={"steps": STEPS, **train},
        monitor={"report": False, "windows": 0, "machine_seconds": 0.0, "every": 2},
        valid={"every": 2, "samples": 8},
        checkpoint={"every": 2},
    )
    config.train.cuda_graphs = graphs
    return config


@pytest.mark.moderate
@pytest.mark.parametrize(
    "keys",
    [{}, pytest.param({"activation_checkpointing": "block", "precision": "bf16"}, marks=pytest.mark.slow)],
)
def test_replayed_passes_train_the_same_bits(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, keys: dict[str, str]
) -> None:
    graphs = as_on_a_gpu(monkeypatch)
    plain, replayed = (config_of(small_run, name, name, **keys) for name in ("none", "passes"))
    assert train(plain) == 0 and not graphs
    assert train(replayed) == 0
    rows = numbers(plain.run.dir)
    assert numbers(replayed.run.dir) == rows and any("residual_rms/00" in row for row in rows)
    assert [graph.replays for graph in graphs] == [2 * STEPS - STEPS // 2, STEPS // 2]
    graphs.clear()
    shutil.rmtree(RunDirectory(replayed.run.dir).checkpoint_path(STEPS))
    assert train(replayed) == 0 and len(graphs) == 2, "it was resumed"
    assert numbers(replayed.run.dir) == rows


@pytest.mark.moderate
def test_gradients_of_a_skipped_step_are_gone(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    replay, calls = captured.Captured.replay, iter(range(100))

    def poisoned(strategy, *arguments):
        passed = replay(strategy, *arguments)
        if next(calls) == 3:  # of the second step
            strategy._gradients[0] = torch.inf
        return passed

    monkeypatch.setattr(captured.Captured, "replay", poisoned)
    config = config_of(small_run, "skips", "passes")
    assert train(config) == 0
    rows = [row for row in numbers(config.run.dir) if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1] and all(row["loss"] < 4 for row in rows)


def test_a_cpu_is_refused_before_anything_is_written(small_run: SmallRun) -> None:
    config = config_of(small_run, "refused", "passes")
    config.run.device = "auto"
    with pytest.raises(UserError, match=r"train\.cuda_graphs: passes does not go with run\.device=cpu"):
        train(config)
    assert not RunDirectory(config.run.dir).path.exists()


def _train(rank: int, configs: list[Config]) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        graphs = as_on_a_gpu(patch)
        return [train(config) or len(graphs) for config in configs]


@pytest.mark.slow
def test_ranks_that_exchange_gradients_at_once_train_the_bits_of_ddp(small_run: SmallRun) -> None:
    """Sums over two ranks have only one order, and their means are exact."""
    configs = [config_of(small_run, name, name, micro_batch=2) for name in ("none", "passes")]
    assert on_ranks(2, _train, configs) == [[0, 2], [0, 2]]
    rows, expected = (numbers(config.run.dir) for config in reversed(configs))
    assert rows == expected
