"""`train.activation_checkpointing: auto`: what it measures and chooses, and that no number of a run depends on it."""

import json
import logging
from pathlib import Path

import pytest
import torch

from caduceus.config import Config
from caduceus.distributed.build import build_strategy
from caduceus.distributed.layout import RESERVE, blocks_to_recompute
from caduceus.distributed.mesh import Ranks
from caduceus.train import memory, recomputation, trainer
from caduceus.train.recomputation import run_micro_batch
from tests.distributed.ranks import on_ranks
from tests.train.conftest import SmallRun, numbers

LAYERS = 4
MODEL = {"d_model": 16, "n_layer": LAYERS, "d_state": 4}
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def automatic(small_run: SmallRun, name: str = "auto", rcps: bool = True, **train) -> Config:
    train = {"steps": 3, "activation_checkpointing": "auto", **train}
    return small_run.config(name, model={**MODEL, "rcps": rcps}, train=train, valid={"every": 0})


def measure(config: Config) -> tuple[int, int, list[int]]:
    """(bytes with all blocks but the last recomputed, what keeping another adds, bytes with 0, 1, … recomputed)."""
    strategy = build_strategy(config, ALONE)
    peaks = []
    for blocks in range(LAYERS):
        strategy.model.checkpoint_blocks = blocks
        peaks.append(memory.peak_bytes(ALONE.device, lambda: run_micro_batch(config, strategy)))
    return peaks[-1], recomputation.bytes_added_by_keeping_a_block(config, ALONE), peaks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rcps", [True, False])
@pytest.mark.parametrize("micro_batch", [8, 4])  # alone in its step, and with gradients in memory
def test_the_bytes_foretold_are_those_of_a_micro_batch(small_run, rcps: bool, micro_batch: int, precision: str) -> None:
    least, added, peaks = measure(automatic(small_run, rcps=rcps, micro_batch=micro_batch, precision=precision))
    for recomputed, peak in enumerate(peaks):
        foretold = least + (LAYERS - 1 - recomputed) * added
        assert foretold == pytest.approx(peak, rel=0.02)


def test_no_more_blocks_are_recomputed_than_must_be() -> None:
    def chosen(spendable: float) -> int:
        return blocks_to_recompute(least=1000, added=200, free=round(spendable / (1 - RESERVE)), layers=5)

    assert [chosen(bytes_) for bytes_ in (1805, 1795, 1605, 1595, 1205, 1195, 1005, 10)] == [0, 1, 1, 2, 3, 4, 4, 4]
    assert blocks_to_recompute(least=1000, added=0, free=10, layers=1) == 0


def pretend_that_free_is(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)


def memory_for(kept: int, least: int, added: int) -> int:
    """Free bytes with which, after the reserve, `kept` blocks besides the last can keep their activations."""
    return int((least + (kept + 0.5) * added) / (1 - RESERVE))


def test_a_run_in_little_memory_has_the_numbers_of_one_with_plenty(small_run, monkeypatch, caplog) -> None:
    plain = automatic(small_run, "plain", activation_checkpointing="none")
    assert trainer.train(plain) == 0
    config = automatic(small_run)
    least, added, _ = measure(config)
    least += memory.moment_bytes_to_come(build_strategy(config, ALONE))
    for kept in range(LAYERS):
        config = automatic(small_run, f"keeps {kept}")
        pretend_that_free_is(monkeypatch, memory_for(kept, least, added))
        with caplog.at_level(logging.INFO):
            assert trainer.train(config) == 0
        assert f"auto recomputes {LAYERS - 1 - kept} of {LAYERS} blocks" in caplog.text
        assert numbers(config.run.dir) == numbers(plain.run.dir)


def test_it_says_so_where_even_recomputing_does_not_fit(small_run, monkeypatch, caplog) -> None:
    pretend_that_free_is(monkeypatch, 1000)
    with caplog.at_level(logging.INFO):
        assert trainer.train(automatic(small_run)) == 0
    assert f"auto recomputes {LAYERS - 1} of {LAYERS} blocks" in caplog.text
    assert "more than there is; lower train.micro_batch" in caplog.text


PARALLEL = {
    "DDP": {"strategy": "ddp"},
    "FSDP": {"strategy": "fsdp"},
    "context": {"strategy": "ddp", "context": 2},
    "strands": {"strategy": "ddp", "strands": 2},
    "ZeRO 1": {"strategy": "deepspeed", "zero_stage": 1},
    "ZeRO 3": {"strategy": "deepspeed", "zero_stage": 3},
}


def train_each(rank: int, configs: dict[str, Config]) -> dict[str, int]:
    """Blocks that this rank recomputes in each training; rank 0 has plenty of memory, and rank 1 has none."""
    found = {}
    for name, config in configs.items():
        with pytest.MonkeyPatch.context() as patch:
            strategies = []
            build = lambda *given, to=strategies: to.append(build_strategy(*given)) or to[0]  # noqa: E731
            patch.setattr(trainer, "build_strategy", build)
            pretend_that_free_is(patch, (2**60, 0)[rank])
            assert trainer.train(config) == 0
        model = strategies[0].model
        found[name] = getattr(model, "module", model).checkpoint_blocks
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
        for mode in ("none", "auto")
    }
    for found in on_ranks(2, train_each, configs):
        assert found == {name: LAYERS - 1 if name.endswith("auto") else 0 for name in configs}
    for name in PARALLEL:
        none, auto = (losses(configs[f"{name} {mode}"].run.dir) for mode in ("none", "auto"))
        # Reduced in another order: fp32 rounding over three steps.
        assert auto == pytest.approx(none, rel=1e-6), name


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
