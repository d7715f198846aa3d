"""Options that each strategy has to bear: compiled and recomputed blocks, offloading, autocast, determinism."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from caduceus.train import trainer
from tests.distributed.layouts import Layout, config_of, train_all

pytestmark = pytest.mark.slow

STRATEGIES = {
    "DDP": {"strategy": "ddp"},
    "FSDP": {"strategy": "fsdp"},
    "ZeRO 2": {"strategy": "deepspeed", "zero_stage": 2},
    "ZeRO 3": {"strategy": "deepspeed", "zero_stage": 3},
    "context": {"strategy": "ddp", "context": 2},
    "strands": {"strategy": "ddp", "strands": 2},
}
# Reduced in another order, or computed by fused kernels: fp32 rounding over a few steps.
CLOSE = 1e-5


@dataclass(frozen=True)
class Option:
    """Keys of `train.` and `parallel.` that leave the losses as they are, up to a relative difference."""

    name: str
    train: dict
    parallel: dict
    within: float


PLAIN = Option("plain", {}, {}, 0)
OPTIONS = [
    Option("recomputed", {"activation_checkpointing": "block"}, {}, CLOSE),
    Option("scan inputs recomputed, compiled", {"activation_checkpointing": "scan", "compile": True}, {}, CLOSE),
    Option("deterministic", {"deterministic": True}, {}, 0),
    Option("bf16", {"precision": "bf16"}, {}, 2e-2),
    Option("offloaded", {}, {"cpu_offload": True}, CLOSE),
    Option("compiled", {"compile": True}, {}, CLOSE),
]


@pytest.fixture(scope="module")
def losses(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[float]]:
    """By strategy and option, on two ranks, in one set of processes."""
    directory = tmp_path_factory.mktemp("options")
    configs = {}
    for strategy, parallel in STRATEGIES.items():
        for option in (PLAIN, *OPTIONS):
            layout = Layout("", 2, {**parallel, **option.parallel})
            train = {"steps": 4, "lr": 4e-3, **option.train}
            configs[strategy, option.name] = config_of(
                layout, small_shards, directory / f"{strategy} {option.name}", 2, **train
            )
    train_all(2, list(configs.values()))
    return {
        key: [json.loads(line)["loss"] for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
        for key, config in configs.items()
    }


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_option_leaves_the_run_as_it_is(losses: dict, strategy: str, option: Option) -> None:
    assert len(losses[strategy, option.name]) == 4
    assert losses[strategy, option.name] == pytest.approx(losses[strategy, "plain"], rel=option.within)


def test_bf16_computes_in_bf16_under_every_strategy(losses: dict) -> None:
    for strategy in STRATEGIES:
        assert losses[strategy, "bf16"] != losses[strategy, "plain"]
        assert losses[strategy, "bf16"] == pytest.approx(losses["DDP", "bf16"], rel=CLOSE)


def test_determinism_is_torchs(small_shards: Path, tmp_path: Path) -> None:
    single = Layout("", 1, {"strategy": "single"})
    for deterministic in (True, False):
        config = config_of(single, small_shards, tmp_path / str(deterministic), steps=1, deterministic=deterministic)
        assert trainer.train(config) == 0
        assert torch.are_deterministic_algorithms_enabled() == deterministic
