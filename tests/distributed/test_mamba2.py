"""A Caduceus with Mamba-2's mixer trains alike under every kind of layout."""

import json
from pathlib import Path

import pytest

from caduceus.config import CaduceusConfig, Config
from tests.distributed.layouts import LAYOUTS, Layout, config_of, train_all

pytestmark = pytest.mark.slow

STEPS = 4
NAMES = (
    *("single", "DDP 2", "FSDP 2", "ZeRO 2, 2 ranks", "ZeRO 3, 2 ranks", "context 2", "strands 2", "context 4"),
    "FSDP 2 x 2 hybrid, strands 2 x context 2",
)


def configured(layout: Layout, shards: Path, directory: Path) -> Config:
    config = config_of(layout, shards, directory, steps=STEPS)
    config.model = CaduceusConfig(d_model=8, n_layer=2, d_state=4, rcps=True, mixer="mamba2", headdim=8)
    return config


def test_losses_and_gradients_are_those_of_one_process(small_shards: Path, tmp_path: Path) -> None:
    found = {}
    for world in (1, 2, 4):
        layouts = [layout for layout in LAYOUTS if layout.world == world and layout.name in NAMES]
        configs = [configured(layout, small_shards, tmp_path / f"{world}-{n}") for n, layout in enumerate(layouts)]
        for layout, config, observed in zip(layouts, configs, train_all(world, configs), strict=True):
            rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
            losses, norms = ([row[name] for row in rows if "loss" in row] for name in ("loss", "grad_norm"))
            found[layout.name] = losses, norms, observed[0].gradients
    assert found.keys() == set(NAMES)
    expected_losses, expected_norms, expected_gradients = found.pop("single")
    assert len(expected_losses) == STEPS and expected_losses[-1] < expected_losses[0]
    for name, (losses, norms, gradients) in found.items():
        assert losses == pytest.approx(expected_losses, rel=1e-4), name
        assert losses[0] == pytest.approx(expected_losses[0], rel=1e-6), name
        assert norms[0] == pytest.approx(expected_norms[0], rel=1e-5), name
        for parameter, gradient in expected_gradients.items():
            error, scale = (gradients[parameter] - gradient).abs().max().item(), gradient.abs().max().item()
            assert scale > 0 and error < 1e-5 * scale + 1e-8, f"{name}, {parameter}: {error / scale:.1e}"
