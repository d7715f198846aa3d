"""`train.activation_checkpointing: auto`: what it measures and chooses, and that no number of a run depends on it."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from caduceus.config import Config
from caduceus.distributed.build import build_strategy
from caduceus.distributed.footprint import RESERVE, blocks_to_recompute
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.train import memory, recomputation, setup, trainer
from caduceus.train.optimizer import build_optimizer
from caduceus.train.recomputation import run_micro_batch
from tests.distributed.ranks import on_ranks
from tests.train.conftest import SmallRun, numbers

LAYERS = 3
MODEL = {"d_model": 16, "n_layer": LAYERS, "d_state": 4}
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def automatic(small_run: SmallRun, name: str = "auto", rcps: bool = True, **train) -> Config:
    train = {"steps": 2, "activation_checkpointing": "auto", **train}
    return small_run.config(name, model={**MODEL, "rcps": rcps}, train=train, valid={"every": 0})


WAYS = [(whole, inputs) for whole in range(LAYERS) for inputs in range(LAYERS - whole)]
"""Blocks that are recomputed whole, and others of which the scan's inputs are; the last one keeps all."""


def peak_bytes(strategy: Strategy, config: Config, whole: int, inputs: int) -> int:
    strategy.model.recomputed_blocks, strategy.model.recomputed_scan_inputs = whole, inputs
    return memory.peak_bytes(ALONE.device, lambda: run_micro_batch(config, strategy))


def measure(config: Config) -> tuple[int, int, int]:
    """Bytes with all blocks but the last recomputed; what one adds that keeps all but the scan's inputs; or all."""
    least = peak_bytes(build_strategy(config, ALONE, build_optimizer), config, LAYERS - 1, 0)
    return least, *recomputation.bytes_added_by_a_block(config, ALONE)


def foretold(way: tuple[int, int], least: int, lean: int, full: int) -> int:
    whole, inputs = way
    return least + inputs * lean + (LAYERS - 1 - whole - inputs) * full


@pytest.mark.moderate
@pytest.mark.parametrize(  # a micro-batch of 8 is alone in its step, one of 4 comes with gradients in memory
    ("rcps", "micro_batch", "precision"),
    [
        (True, 8, "fp32"),
        pytest.param(False, 4, "fp32", marks=pytest.mark.slow),
        pytest.param(True, 4, "bf16", marks=pytest.mark.slow),
    ],
)
def test_the_bytes_foretold_are_those_of_a_micro_batch(small_run, rcps: bool, micro_batch: int, precision: str) -> None:
    config = automatic(small_run, rcps=rcps, micro_batch=micro_batch, precision=precision)
    measured, strategy = measure(config), build_strategy(config, ALONE, build_optimizer)
    for way in WAYS:
        assert foretold(way, *measured) == pytest.approx(peak_bytes(strategy, config, *way), rel=0.02), way


@pytest.mark.parametrize(("lean", "full"), [(100, 200), (150, 200), (50, 200), (200, 200), (250, 200), (1, 200)])
def test_no_more_is_recomputed_than_must_be(lean: int, full: int) -> None:
    """The way that fits with the fewest whole blocks, and then the fewest others; if none fits, the smallest."""
    for spendable in range(990, 1810, 5):
        free = math.ceil(spendable / (1 - RESERVE))
        fitting = [way for way in WAYS if foretold(way, 1000, lean, full) <= int((1 - RESERVE) * free)]
        assert blocks_to_recompute(1000, lean, full, free, LAYERS) == min(fitting, default=(LAYERS - 1, 0)), spendable


def test_ranks_take_what_needs_the_least_memory() -> None:
    """The largest of their pairs, which fits wherever each one's own does."""
    ways = [blocks_to_recompute(1000, 80, 200, free, LAYERS) for free in range(1000, 2000, 10)]
    needs = [foretold(way, 1000, 80, 200) for way in ways]
    assert ways == sorted(ways, reverse=True) and needs == sorted(needs)
    assert blocks_to_recompute(1000, 0, 0, 10, 1) == (0, 0)


def pretend_that_free_is(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)


def memory_for(way: tuple[int, int], least: int, lean: int, full: int) -> int:
    """Free bytes which, after the reserve, are a little more than are needed so."""
    return int((foretold(way, least, lean, full) + 0.5 * min(lean, full - lean)) / (1 - RESERVE))


@pytest.mark.slow
def test_a_run_in_little_memory_has_the_numbers_of_one_with_plenty(small_run, monkeypatch, caplog) -> None:
    plain = automatic(small_run, "plain", activation_checkpointing="none")
    assert trainer.train(plain) == 0
    scan = automatic(small_run, "scan", activation_checkpointing="scan")
    assert trainer.train(scan) == 0
    assert numbers(scan.run.dir) == numbers(plain.run.dir)
    config = automatic(small_run)
    least, lean, full = measure(config)
    least += memory.moment_bytes_to_come(config, build_strategy(config, ALONE, build_optimizer))
    for whole, inputs in ((0, 0), (0, 2), (1, 1), (2, 0)):
        config = automatic(small_run, f"{whole} {inputs}")
        pretend_that_free_is(monkeypatch, memory_for((whole, inputs), least, lean, full))
        with caplog.at_level(logging.INFO):
            assert trainer.train(config) == 0
        assert f"auto recomputes {whole} of {LAYERS} blocks, and of {inputs} others what feeds the scan" in caplog.text
        assert numbers(config.run.dir) == numbers(plain.run.dir)


@pytest.mark.moderate
def test_it_says_so_where_even_recomputing_does_not_fit(small_run, monkeypatch, caplog) -> None:
    pretend_that_free_is(monkeypatch, 1000)
    with caplog.at_level(logging.INFO):
        assert trainer.train(automatic(small_run)) == 0
    assert f"auto recomputes {LAYERS - 1} of {LAYERS} blocks" in caplog.text
    assert "more than the free memory; lower train.micro_batch" in caplog.text


PARALLEL = {
    "DDP": {"strategy": "ddp"},
    "FSDP": {"strategy": "fsdp"},
    "context": {"strategy": "ddp", "context": 2},
    "strands": {"strategy": "ddp", "strands": 2},
    "ZeRO 1": {"strategy": "deepspeed", "zero_stage": 1},
    "ZeRO 3": {"strategy": "deepspeed", "zero_stage": 3},
}

MODES = {"none": (0, 0), "scan": (0, LAYERS), "auto": (LAYERS - 1, 0)}


def train_each(rank: int, configs: dict[str, Config]) -> dict[str, tuple[int, int]]:
    """What this rank recomputes in each training; rank 0 has plenty of memory, and rank 1 has none."""
    found = {}
    for name, config in configs.items():
        with pytest.MonkeyPatch.context() as patch:
            strategies = []
            build = lambda *given, to=strategies: to.append(build_strategy(*given)) or to[0]  # noqa: E731
            patch.setattr(setup, "build_strategy", build)
            pretend_that_free_is(patch, (2**60, 0)[rank])
            assert trainer.train(config) == 0
        model = getattr(strategies[0].model, "module", strategies[0].model)
        found[name] = model.recomputed_blocks, model.recomputed_scan_inputs
    return found


@pytest.mark.slow
def test_ranks_agree_and_every_strategy_keeps_its_losses(small_run: SmallRun) -> None:
    configs = {
        f"{name} {mode}": small_run.config(
            f"{name} {mode}",
            model={**MODEL, "rcps": True},
            train={"steps": 3, "micro_batch": 2, "activation_checkpointing": mode},
            parallel=parallel,
            valid={"every": 0},
        )
        for name, parallel in PARALLEL.items()
        for mode in MODES
    }
    for found in on_ranks(2, train_each, configs):
        assert found == {name: MODES[name.rpartition(" ")[2]] for name in configs}
    for name in PARALLEL:
        none, *others = (losses(configs[f"{name} {mode}"].run.dir) for mode in MODES)
        # Reduced in another order: fp32 rounding over three steps.
        assert all(other == pytest.approx(none, rel=1e-6) for other in others), name


def losses(run_directory: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run_directory) / "metrics.jsonl").read_text().splitlines()]


def test_a_control_group_limits_the_memory_of_the_host(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\nHugePages_Total: 0\n")
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    groups = tmp_path / "groups"
    limits = {"job": (3_000_000, 1_500_000, 400_000), "job/step": ("max", 1_400_000, 300_000)}
    for name, (most, used, cached) in limits.items():
        (groups / name).mkdir(parents=True)
        (groups / name / "memory.max").write_text(f"{most}\n")
        (groups / name / "memory.current").write_text(f"{used}\n")
        (groups / name / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_CGROUPS", groups)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_memory(ALONE.device) == (3_000_000 - 1_500_000 + 400_000) // 2
    (groups / "job" / "memory.max").write_text("max\n")
    assert memory.free_memory(ALONE.device) == 8000 * 1024 // 2


@pytest.mark.parametrize(
    ("keys", "free", "kept"),
    [
        ({"train": {"keep_states": "all"}}, 0, LAYERS),
        ({"train": {"keep_states": "none"}}, 1 << 40, 0),
        ({"ops": {"backend": "cpu"}}, 1 << 40, 0),
        ({"model": {**MODEL, "mixer": "mamba2", "headdim": 8}}, 1 << 40, 0),
        ({}, 1 << 40, LAYERS),
        ({}, 0, 0),
        ({}, "two", 2),
        ({}, "nearly two", 1),
    ],
)
def test_states_are_kept_where_memory_allows(
    small_run, monkeypatch: pytest.MonkeyPatch, keys: dict, free: int | str, kept: int
) -> None:
    """Beside a micro-batch that takes 1000 bytes, and the moments to come."""
    config = small_run.config(
        "keeps", **{"model": MODEL, **keys, "train": {"keep_states": "auto", **keys.get("train", {})}}
    )
    strategy = build_strategy(config, ALONE, build_optimizer)
    if "ops" not in keys:
        config.ops.backend = "triton"
    monkeypatch.setattr(memory, "peak_bytes", lambda device, run: 1000)
    if isinstance(free, str):
        # 4 sequences of 128 bases and both strands, 32 channels: one state of 8 and 2 directions and 4, and the output
        a_block = 4 * 128 * 2 * 32 * 4 * (2 * 4 // 8 + 1)
        needed = 1000 + memory.moment_bytes_to_come(config, strategy) + 2 * a_block
        free = math.ceil(needed / (1 - RESERVE)) - 100 * (free == "nearly two")
    pretend_that_free_is(monkeypatch, free)
    assert recomputation.keep_states_to_fit(config, strategy) == kept
    assert [block.mixer.keeps_states for block in strategy.model.blocks] == [False] * (LAYERS - kept) + [True] * kept
