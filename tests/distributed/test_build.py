"""What `auto` takes, and that all strategies begin with the same bits."""

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from caduceus import CaduceusForMaskedLM
from caduceus.config import Config, config_from_dict
from caduceus.distributed import build
from caduceus.distributed.build import build_model, build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.model.block import Block
from caduceus.train.optimizer import build_optimizer
from tests.distributed.ranks import on_ranks

CPU = torch.device("cpu")


def config(**sections: dict[str, Any]) -> Config:
    model = {"d_model": 8, "n_layer": 3, "d_state": 4, "rcps": True}
    return config_from_dict({"model": model, "train": {"seed": 3, "micro_batch": 4}, **sections})


def first_weights(seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return CaduceusForMaskedLM(config().model).state_dict()


@pytest.mark.moderate
def test_a_model_from_the_meta_device_has_the_weights_of_one_built_at_once() -> None:
    weights = build_strategy(config(), Ranks(0, 1, 1, CPU), build_optimizer).model.state_dict()
    assert weights.keys() == first_weights().keys()
    for name, tensor in first_weights().items():
        assert torch.equal(weights[name], tensor), name
    double = build_strategy(config(train={"seed": 3, "precision": "fp64"}), Ranks(0, 1, 1, CPU), build_optimizer).model
    assert all(parameter.dtype == torch.float64 for parameter in double.parameters())
    assert torch.equal(double.state_dict()["blocks.0.mixer.x_proj"], first_weights()["blocks.0.mixer.x_proj"].double())


def test_a_built_model_takes_no_memory() -> None:
    assert all(tensor.is_meta for tensor in (*build_model(config()).parameters(), *build_model(config()).buffers()))


@pytest.mark.slow
def test_no_block_is_left_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is recomputed, with and without padding and gradients, in one process."""
    monkeypatch.setattr(Block, "compile", lambda block: nn.Module.compile(block, backend="eager"))
    torch.compiler.reset()
    model = build_strategy(
        config(train={"compile": True, "micro_batch": 4}), Ranks(0, 1, 1, CPU), build_optimizer
    ).model
    input_ids = torch.full((2, 9), 7)
    pad_mask = torch.zeros(2, 9, dtype=torch.bool)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for model.recomputed_blocks, model.recomputed_scan_inputs in ((2, 0), (0, 0), (0, 2), (1, 1)):
            for mask in (None, pad_mask):
                model(input_ids, input_ids, pad_mask=mask).loss.backward()
                with torch.no_grad():
                    model(input_ids, pad_mask=mask)


def weights_of_all_strategies(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    parallels = {
        "ddp": {"strategy": "ddp"},
        "fsdp": {"strategy": "fsdp"},
        "zero 1": {"strategy": "deepspeed", "zero_stage": 1},
        "zero 3": {"strategy": "deepspeed", "zero_stage": 3},
    }
    weights = {}
    for name, parallel in parallels.items():
        strategy = build_strategy(config(parallel=parallel), Ranks(rank, 2, 1, CPU), build_optimizer)
        if parallel["strategy"] == "deepspeed":
            weights[name] = strategy._gather_weights()
            continue
        state = strategy.state_dict()["model"]
        weights[name] = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in state.items()}
    return weights


@pytest.mark.slow
def test_all_strategies_begin_with_the_same_bits() -> None:
    for name, weights in on_ranks(2, weights_of_all_strategies)[0].items():
        for key, tensor in first_weights().items():
            assert torch.equal(weights[key], tensor), (name, key)


@pytest.mark.parametrize(
    ("parameters", "world", "node", "strategy", "shard"),
    [
        (7_700_000, 1, 1, "single", 0),
        (7_700_000, 64, 8, "ddp", 0),
        (1_000_000_000, 64, 8, "fsdp", 8),
        (7_000_000_000, 8, 8, "fsdp", 0),
        (7_000_000_000, 12, 8, "fsdp", 0),
    ],
)
def test_auto_goes_by_the_size_of_the_model(
    monkeypatch: pytest.MonkeyPatch, parameters: int, world: int, node: int, strategy: str, shard: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    parallel = config().parallel
    reason = build._choose(parallel, parameters, world)
    assert (parallel.strategy, parallel.shard) == (strategy, shard)
    assert "\n" not in reason and (world == 1 or f"{parameters:,}" in reason)


def test_auto_says_what_it_chose_and_leaves_the_configuration(caplog: pytest.LogCaptureFixture) -> None:
    automatic = config()
    with caplog.at_level(logging.INFO):
        build_strategy(automatic, Ranks(0, 1, 1, CPU), build_optimizer)
    assert "auto chose 'single' (one process)" in caplog.text
    assert automatic.parallel.strategy == "auto"


@pytest.mark.parametrize(
    ("parallel", "named"),
    [
        ({"strategy": "single", "deepspeed_config": "ds.json", "shard": 1}, ["shard", "deepspeed_config"]),
        ({"strategy": "auto", "cpu_offload": True, "zero_stage": 3}, ["cpu_offload", "zero_stage"]),
        ({"strategy": "single"}, []),
    ],
)
def test_keys_without_effect_are_named(parallel: dict, named: list[str], caplog: pytest.LogCaptureFixture) -> None:
    build_strategy(config(parallel=parallel), Ranks(0, 1, 1, CPU), build_optimizer)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    keys = ", ".join(f"parallel.{name}" for name in named)
    assert warnings == ([f"{keys}: has no effect under parallel.strategy=single"] if named else [])
