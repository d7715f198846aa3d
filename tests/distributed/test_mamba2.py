"""A Caduceus with Mamba-2's mixer trains alike under every kind of layout."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from caduceus.config import CaduceusConfig, Config
from tests.distributed.layouts import LAYOUTS, config_of, train_all

pytestmark = pytest.mark.slow

STEPS = 4
ZERO = [f"ZeRO {stage}, 2 ranks" for stage in range(4)]
NAMES = (
    *("single", "DDP 2", "FSDP 2", *ZERO, "context 2", "strands 2", "context 4"),
    "FSDP 2 x 2 hybrid, strands 2 x context 2",
)
RESTARTED = ("DDP 2", "FSDP 2", "ZeRO 1, 2 ranks", "ZeRO 3, 2 ranks", "context 2", "strands 2")
"""Layouts on which a run is stopped halfway and goes on; ZeRO 1 stands for 0 and 2, whose checkpoints are like its."""
MOVES = ("FSDP 2", "strands 2", "context 2")
"""What one run goes through, a step each, after its first on one process."""
BY_NAME = {layout.name: layout for layout in LAYOUTS}


class Trainings:
    """Runs of one small model in directories below one, under layouts by their names."""

    def __init__(self, shards: Path, directory: Path) -> None:
        self.shards, self.directory = shards, directory

    def leg(self, run: str, layout: str, until: int = STEPS) -> Config:
        train = {"steps": until, "lr": 4e-3, "min_lr": 4e-3}  # constant, whatever the steps
        config = config_of(BY_NAME[layout], self.shards, self.directory / run, **train)
        config.model = CaduceusConfig(d_model=8, n_layer=2, d_state=4, rcps=True, mixer="mamba2", headdim=8)
        config.run.allow_change = ["train.steps"]
        return config

    def numbers(self, run: str) -> list[tuple[float, ...]]:
        rows = [json.loads(line) for line in (self.directory / run / "metrics.jsonl").read_text().splitlines()]
        return [(row["loss"], row["grad_norm"], row["samples"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def trainings(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(small_shards, tmp_path_factory.mktemp("mamba2"))


@pytest.fixture(scope="module")
def gradients(trainings: Trainings) -> dict[str, dict[str, Tensor]]:
    """Gradients of the first step under each layout; all trainings of this file run in few sets of processes."""
    found = {}
    for world in (1, 2, 4):
        names = [layout.name for layout in LAYOUTS if layout.world == world and layout.name in NAMES]
        configs = [trainings.leg(name, name) for name in names]
        if world == 1:
            configs.append(trainings.leg("moved", "single", 1))
        if world == 2:
            configs += [trainings.leg(f"broken {name}", name, until) for name in RESTARTED for until in (2, STEPS)]
            configs += [trainings.leg("moved", name, until) for until, name in enumerate(MOVES, start=2)]
        observed = train_all(world, configs)
        found |= {name: of_ranks[0].gradients for name, of_ranks in zip(names, observed, strict=False)}
    return found


def test_a_restart_on_the_same_layout_changes_no_bit(trainings: Trainings, gradients: dict) -> None:
    for name in RESTARTED:
        assert trainings.numbers(f"broken {name}") == trainings.numbers(name), name


def test_the_same_run_through_several_layouts(trainings: Trainings, gradients: dict) -> None:
    moved, undisturbed = trainings.numbers("moved"), trainings.numbers("single")
    assert [row[2] for row in moved] == [row[2] for row in undisturbed] and len(moved) == STEPS
    assert [row[0] for row in moved] == pytest.approx([row[0] for row in undisturbed], rel=1e-4)


def test_losses_and_gradients_are_those_of_one_process(trainings: Trainings, gradients: dict) -> None:
    assert gradients.keys() == set(NAMES)
    found = {}
    for name, of_first_step in gradients.items():
        losses, norms, _ = zip(*trainings.numbers(name), strict=True)
        found[name] = losses, norms, of_first_step
    expected_losses, expected_norms, expected_gradients = found.pop("single")
    assert len(expected_losses) == STEPS and expected_losses[-1] < expected_losses[0]
    for name, (losses, norms, gradients) in found.items():
        assert losses == pytest.approx(expected_losses, rel=1e-4), name
        assert losses[0] == pytest.approx(expected_losses[0], rel=1e-6), name
        assert norms[0] == pytest.approx(expected_norms[0], rel=1e-5), name
        for parameter, gradient in expected_gradients.items():
            error, scale = (gradients[parameter] - gradient).abs().max().item(), gradient.abs().max().item()
            assert scale > 0 and error < 1e-5 * scale + 1e-8, f"{name}, {parameter}: {error / scale:.1e}"
