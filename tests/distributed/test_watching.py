"""What rows tell of validations and of the network is the same under all arrangements of ranks, and changes no loss."""

from pathlib import Path

import numpy as np
import pytest

from caduceus.config import Config
from caduceus.monitor.windows import windows_of
from caduceus.train import trainer
from tests.distributed.layouts import LAYOUTS, Layout, config_of, train_all
from tests.train.conftest import numbers
from tests.train.test_vitals import without_vitals

SHARED = ("DDP 2", "FSDP 2", "ZeRO 2, 2 ranks", "ZeRO 3, 2 ranks", "context 2", "strands 2")
BY_SAMPLE = ("dt_", "decay_", "residual_rms", "mixer_rms")
"""Entries that depend on the samples that a rank happens to look at."""


def watched(layout: Layout, shards: Path, directory: Path, every: int, **model: bool) -> Config:
    config = config_of(layout, shards, directory, accumulation=2, steps=2)
    config.monitor.every, config.monitor.windows = every, 1
    config.valid.every, config.valid.samples = 2, 5
    for name, value in model.items():
        setattr(config.model, name, value)
    return config


@pytest.mark.slow
def test_rows_tell_the_same_however_ranks_share_the_work(small_shards: Path, tmp_path: Path) -> None:
    layouts = {layout.name: layout for layout in LAYOUTS}
    alone = watched(layouts["single"], small_shards, tmp_path / "alone", 1)
    ph = watched(layouts["single"], small_shards, tmp_path / "ph", 1, rcps=False)
    shared = {name: watched(layouts[name], small_shards, tmp_path / name, 1) for name in SHARED}
    without = {name: watched(layouts[name], small_shards, tmp_path / f"{name} 0", 0) for name in SHARED}
    ph_context = watched(layouts["context 2"], small_shards, tmp_path / "ph context", 1, rcps=False)
    for config in (alone, ph):
        assert trainer.train(config) == 0
    train_all(2, [*shared.values(), *without.values(), ph_context])
    expected = numbers(alone.run.dir)
    assert any(key.startswith("update_ratio/") for key in expected[0])
    for name, config in shared.items():
        rows = numbers(config.run.dir)
        assert [without_vitals(row) for row in rows] == numbers(without[name].run.dir), name
        for row, single in zip(rows, expected, strict=True):
            left_out = {key for key in single if key not in row}
            assert all(key.startswith(left_out_of(name)) for key in left_out), name
            assert all(key in row for key in single if key.startswith(BY_SAMPLE))
            same = {key: value for key, value in single.items() if key in row and not key.startswith(BY_SAMPLE)}
            assert {key: row[key] for key in same} == pytest.approx(same, rel=1e-4, abs=1e-6), name
        assert_same_windows(config, alone)
    last, expected = numbers(ph_context.run.dir)[-1], numbers(ph.run.dir)[-1]
    assert last == pytest.approx(expected, rel=1e-4) and last["valid_rc_disagreement"] > 1e-4
    assert_same_windows(ph_context, ph)


def assert_same_windows(config: Config, expected: Config) -> None:
    """Rank 0 alone keeps them, and they are the same, save that a slice of the sequence may hold another stretch."""
    windows, of_one = (windows_of(Path(run.run.dir), 2) for run in (config, expected))
    assert [window["kind"] for window in windows] == ["worst", "best"]
    for window, single in zip(windows, of_one, strict=True):
        stretch, other = window.pop("stretch"), single["stretch"]
        bins, of_bins = window.pop("bins"), single["bins"]
        losses, of_losses = (np.array(values["loss"], float) for values in (bins, of_bins))  # None is NaN
        assert np.allclose(losses, of_losses, rtol=1e-4, equal_nan=True) and bins["repeat"] == of_bins["repeat"]
        for name in ("loss", "accuracy"):
            assert window.pop(name) == pytest.approx(single[name], rel=1e-4)
        assert window == {key: single[key] for key in window}
        first = stretch["start"] - other["start"]
        assert len(stretch["bases"]) == 64 // max(1, config.parallel.context) and stretch["bases"] in other["bases"]
        assert stretch["labelled"] == other["labelled"][first : first + len(stretch["bases"])]
        likely = other["likelihood"][first : first + len(stretch["bases"])]
        assert np.allclose(stretch["likelihood"], likely, atol=2e-4)


def left_out_of(name: str) -> tuple[str, ...]:
    """What DeepSpeed cannot tell: it cuts gradients, and in stage 3 weights, without regard to parameters."""
    return {"ZeRO 2, 2 ranks": ("grad_norm/",), "ZeRO 3, 2 ranks": ("grad_norm/", "update_ratio/")}.get(name, ())
