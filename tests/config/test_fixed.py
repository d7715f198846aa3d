"""What a key fixes holds: a resumed run refuses the change, or makes the same numbers."""

import dataclasses
import shutil
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from caduceus.config import KEYS, SECTIONS, Config, StageConfig, changes, config_to_dict, order_values
from caduceus.errors import UserError
from caduceus.run.directory import OPTIMIZER_STATE, RunDirectory
from caduceus.train.trainer import train
from tests.train.conftest import SmallRun, numbers

OTHER: dict[str, Any] = {
    "model.d_model": 32,
    "model.n_layer": 2,
    "model.vocab_size": 8,
    "model.pad_vocab_size_multiple": 4,
    "model.mixer": "mamba2",
    "model.d_state": 8,
    "model.headdim": 32,
    "model.d_conv": 3,
    "model.expand": 1,
    "model.rcps": False,
    "model.bidirectional": False,
    "model.bidirectional_strategy": "ew_multiply",
    "model.bidirectional_weight_tie": False,
    "model.rms_norm": False,
    "model.norm_epsilon": 1e-3,
    "model.residual_in_fp32": False,
    "model.fused_add_norm": False,
    "ops.backend": "naive",
    "data.path": "a link to the shards",
    "data.species_weights": {"fly": 0.5},
    "data.mode": "stream",
    "data.stream_key": "fa",
    "data.valid_path": "elsewhere",
    "data.allow_unused_species": True,
    "data.allow_commands": True,
    "data.seq_len": 256,
    "data.pack": True,
    "data.crop_offset": "random",
    "data.strands": "both",
    "data.objective": "next_base",
    "data.mask_prob": 0.2,
    "data.mask_span": 3,
    "data.mask_schedule": [[0, 0.3], [2, 0.2]],
    "data.mask_token_prob": 0.7,
    "data.random_token_prob": 0.2,
    "data.weights_bed": "absent.bed",
    "data.weights_elsewhere": 0.5,
    "data.repeat_weight": 0.5,
    "data.min_acgt": 0.9,
    "data.workers": 1,
    "data.shuffle_block": 1,
    "data.cache_dir": "a folder",
    "data.cache_bytes": 1 << 30,
    "data.check_crc": False,
    "data.max_substituted": 0,
    "train.steps": 5,
    "train.stages": [StageConfig(steps=2), StageConfig(steps=2)],
    "train.global_batch": 4,
    "train.batch_ramp": [[0, 4], [2, 8]],
    "train.micro_batch": 2,
    "train.lr": 1e-3,
    "train.min_lr": 1e-5,
    "train.optimizer": "muon",
    "train.lr_scale": {"A_log": 0.1},
    "train.ema": 0.9,
    "train.schedule": "wsd",
    "train.decay_steps": 3,
    "train.decay_from": "elsewhere/checkpoints/step-00000001",
    "train.init_from": "elsewhere",
    "train.warmup_steps": 2,
    "train.warmup_tokens": 2048,
    "train.weight_decay": 0.0,
    "train.betas": [0.95, 0.9],
    "train.clip_norm": 0.1,
    "train.max_skipped_steps": 0,
    "train.spike_factor": 2.0,
    "train.stall_minutes": 1.0,
    "train.seed": 1,
    "train.precision": "bf16",
    "train.deterministic": True,
    "train.compile": True,
    "train.keep_states": "auto",
    "train.cuda_graphs": "none",
    "train.activation_checkpointing": "block",
    "parallel.strategy": "single",
    "parallel.shard": 1,
    "parallel.context": 1,
    "parallel.strands": 1,
    "parallel.zero_stage": 2,
    "parallel.deepspeed_config": "absent.json",
    "parallel.cpu_offload": True,
    "valid.every": 1,
    "valid.samples": 3,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 3,
    "checkpoint.export_every": 2,
    "checkpoint.best": "valid_loss",
    "checkpoint.best_is": "min",
    "checkpoint.async": False,
    "run.dir": "moved",
    "run.name": "another",
    "run.device": "auto",
    "run.time_budget_minutes": 60.0,
    "run.allow_change": ["train.lr"],
    "monitor.every": 7,
    "monitor.machine_seconds": 5.0,
    "monitor.windows": 2,
    "monitor.profile": "2:3",
    "monitor.profile_ranks": [0, 1],
    "monitor.report": False,
    "wandb.mode": "offline",
    "wandb.project": "another",
    "wandb.entity": "another",
    "wandb.id": "mine",
    "wandb.group": "another",
    "wandb.tags": ["another"],
    "wandb.notes": "another",
    "wandb.job_type": "another",
    "wandb.log_every": 2,
    "wandb.artifacts": ["report"],
    "wandb.artifact_files": True,
    "wandb.save_code": True,
    "wandb.alerts": False,
    "wandb.required": True,
}
"""Another value of each key than a small run has."""


@pytest.fixture(scope="module")
def halfway(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[dict[str, Any]]]:
    """A run of four steps of which the last two are undone, and the rows that it had."""
    config = SmallRun(small_shards, tmp_path_factory.mktemp("halfway")).config(
        "run",
        train={"steps": 4},
        valid={"every": 2, "samples": 4},
        data={"seq_len": 64},
        checkpoint={"every": 2, "keep": 0},
    )
    assert train(config) == 0
    shutil.rmtree(RunDirectory(config.run.dir).checkpoint_path(4))
    return config, numbers(config.run.dir)


def changed(config: Config, name: str, tmp_path: Path) -> Config:
    """The run's copy in `tmp_path`, with another value of one key. Combinations are not checked."""
    config = dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section)) for section in SECTIONS}
    )
    value = OTHER[name]
    if name == "data.path":
        (tmp_path / "link").symlink_to(config.data.path)
        value = str(tmp_path / "link")
    elif name == "data.cache_dir":
        value = str(tmp_path / "cache")
    shutil.copytree(config.run.dir, tmp_path / "moved", symlinks=True)
    config.run.dir = str(tmp_path / "moved")
    if name == "checkpoint.best":
        config.checkpoint.best_is = "min"
    if name != "run.dir":
        setattr(getattr(config, KEYS[name].section), KEYS[name].attribute, value)
    return config


def test_every_key_is_tried() -> None:
    assert list(OTHER) == list(KEYS)


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.fixes in ("order", "numbers")])
def test_a_resume_refuses_a_change_of_what_fixes_the_run(halfway, tmp_path: Path, name: str) -> None:
    config = changed(halfway[0], name, tmp_path)
    files = {*tmp_path.rglob("*")}
    with pytest.raises(UserError, match=rf"holds a run with {name}=.*; choose another run\.dir") as refusal:
        RunDirectory.create_or_resume(config)
    assert {*tmp_path.rglob("*")} == files
    advised = f"run.allow_change=[{name}]" in str(refusal.value)
    assert advised == (KEYS[name].fixes == "numbers" and not name.startswith("model.") and name not in OPTIMIZER_STATE)
    if advised:
        config.run.allow_change = [name]
        RunDirectory.create_or_resume(config).release()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.fixes in ("rounding", "nothing")])
def test_a_resume_with_a_change_of_anything_else_makes_the_same_numbers(
    halfway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    if name == "train.compile":  # what inductor makes of a block takes a minute and is tested with the model
        monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    before, rows = halfway
    assert train(changed(before, name, tmp_path)) == 0
    found = numbers(tmp_path / "moved")
    if name.startswith("valid."):
        rows, found = ([row for row in some if "loss" in row] for some in (rows, found))
    if KEYS[name].fixes == "nothing":
        assert found == rows
        return
    assert [row.keys() for row in found] == [row.keys() for row in rows]
    for now, then in zip(found, rows, strict=True):
        # Strands of a Caduceus-PS differ by rounding alone: a difference of equal numbers has no relative error.
        apart = {key for key in then if "rc_disagreement" in key}
        assert all(now[key] == pytest.approx(then[key], abs=1e-7) for key in apart)
        expected = {key: value for key, value in then.items() if key not in apart}
        assert {key: now[key] for key in expected} == pytest.approx(expected, rel=2e-6)


@pytest.mark.moderate
def test_the_order_of_samples_cannot_be_changed_by_name_once_it_is_counted(halfway, tmp_path: Path) -> None:
    config = changed(halfway[0], "data.seq_len", tmp_path)
    config.run.allow_change = ["data.seq_len"]
    with pytest.raises(UserError, match=r"holds a run with data\.seq_len=64, not 256; .*: choose another run\.dir$"):
        RunDirectory.create_or_resume(config)
    shutil.rmtree(tmp_path / "moved" / "checkpoints")
    assert train(config) == 0
    assert len(numbers(config.run.dir)) == len(halfway[1])


def test_changes_are_those_of_keys_that_fix_something(halfway) -> None:
    before = halfway[0]
    now = dataclasses.replace(before, train=dataclasses.replace(before.train, lr=1.0, min_lr=0.5, micro_batch=2))
    assert [(change.key.name, change.before, change.now) for change in changes(before, now)] == [
        ("train.lr", 8e-3, 1.0),
        ("train.min_lr", 1e-4, 0.5),
    ]


def test_keys_are_those_of_the_files() -> None:
    assert list(KEYS) == [f"{section}.{name}" for section, keys in config_to_dict(Config()).items() for name in keys]


def test_checkpoints_go_on_that_were_written_before_a_key_of_the_order_was() -> None:
    first = {"mask_prob", "mask_token_prob", "random_token_prob", "objective", "seq_len", "strands", "min_acgt", "mode"}
    first |= {"shuffle_block", "seed", "global_batch"}
    assert order_values(Config()).keys() == first, "a key that is younger than these stands in _LATER"
