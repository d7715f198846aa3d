"""A run that goes on under another layout is the run that was never stopped."""

import json
from pathlib import Path

import pytest
import torch

from caduceus.config import Config
from caduceus.hub import load
from tests.distributed.layouts import LAYOUTS, Layout, Observed, config_of, train_all

pytestmark = pytest.mark.slow

SINGLE = Layout("single", 1, {"strategy": "single"})
ZERO = [Layout(f"ZeRO {stage}", 2, {"strategy": "deepspeed", "zero_stage": stage}) for stage in range(4)]
ON_TWO = [layout for layout in LAYOUTS if layout.world == 2]
MOVES = ["single", "DDP 2", "FSDP 2", "strands 2", "context 2", "single"]
LEG, SAMPLES_A_STEP = 5, 8
HALF, WHOLE = 2, 4
"""Steps before and after a restart on the same layout, or on another number of ranks."""
TOLERANCES = {"fp32": 1e-4, "fp64": 1e-9}


class Plan:
    """Trainings in run directories below `directory`, which go on where an earlier one ended."""

    def __init__(self, shards: Path, directory: Path) -> None:
        self.shards, self.directory = shards, directory

    def leg(self, name: str, layout: Layout, until: int, precision: str = "fp32") -> Config:
        # A constant learning rate: the cosine would grow with `steps` from leg to leg.
        train = {"steps": until, "lr": 4e-3, "min_lr": 4e-3, "warmup_steps": 1, "precision": precision}
        config = config_of(layout, self.shards, self.directory / name, **train)
        config.run.allow_change = ["train.steps"]
        return config

    def rows(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.directory / name / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in self.rows(name)]


@pytest.fixture(scope="module")
def plan(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan(small_shards, tmp_path_factory.mktemp("restarts"))


@pytest.fixture(scope="module")
def observed(plan: Plan) -> dict[str, list[Observed]]:
    """All trainings of this file, in few sets of processes: what was observed, by directory and last step."""
    by_name = {layout.name: layout for layout in LAYOUTS}
    first = [plan.leg(f"undisturbed-{p}", SINGLE, LEG * len(MOVES), p) for p in TOLERANCES]
    first += [plan.leg(f"moved-{p}", SINGLE, LEG, p) for p in TOLERANCES]
    on_two = [
        plan.leg(f"moved-{precision}", by_name[name], LEG * (number + 1), precision)
        for precision in TOLERANCES
        for number, name in enumerate(MOVES)
        if name != "single"
    ]
    for layout in ON_TWO:
        on_two += [plan.leg(f"whole {layout.name}", layout, WHOLE), plan.leg(f"broken {layout.name}", layout, HALF)]
        on_two += [plan.leg(f"broken {layout.name}", layout, WHOLE)]
    on_two += [plan.leg(f"regrouped {stage}", zero, HALF) for stage, zero in enumerate(ZERO)]
    on_two += [plan.leg("stage 1 to 2", ZERO[1], HALF), plan.leg("stage 1 to 2", ZERO[2], WHOLE)]
    on_two += [plan.leg("whole ZeRO 3, 2 ranks", ZERO[1], WHOLE + 1), plan.leg("whole DDP 2", ZERO[1], WHOLE + 1)]
    on_four = [plan.leg(f"regrouped {n}", Layout("", 4, zero.parallel), WHOLE) for n, zero in enumerate(ZERO)]
    last = [plan.leg(f"moved-{p}", SINGLE, LEG * len(MOVES), p) for p in TOLERANCES]
    last += [plan.leg("whole ZeRO 2, 2 ranks", SINGLE, WHOLE + 1)]
    observed = {}
    for world, configs in ((1, first), (2, on_two), (4, on_four), (1, last)):
        for config, of_ranks in zip(configs, train_all(world, configs), strict=True):
            observed[f"{config.run.name} until {config.train.steps}"] = of_ranks
    return observed


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_same_run_through_all_layouts(plan: Plan, observed: dict, precision: str) -> None:
    for number, name in enumerate(MOVES):
        ranks = observed[f"moved-{precision} until {LEG * (number + 1)}"]
        per_leg = LEG * SAMPLES_A_STEP
        expected = list(range(number * per_leg, (number + 1) * per_leg))
        if name in ("strands 2", "context 2"):
            assert all(rank.samples == expected for rank in ranks)  # every rank has a part of every sample
        else:
            assert sorted(sample for rank in ranks for sample in rank.samples) == expected
    losses, undisturbed = plan.losses(f"moved-{precision}"), plan.losses(f"undisturbed-{precision}")
    assert losses == pytest.approx(undisturbed, rel=TOLERANCES[precision])


@pytest.mark.parametrize("layout", ON_TWO, ids=lambda layout: layout.name)
def test_on_the_same_layout_a_restart_changes_no_bit(plan: Plan, observed: dict, layout: Layout) -> None:
    whole, broken = plan.rows(f"whole {layout.name}"), plan.rows(f"broken {layout.name}")
    numbers = ("step", "samples", "loss", "grad_norm")
    assert [[row[n] for n in numbers] for row in broken] == [[row[n] for n in numbers] for row in whole]
    assert len(whole) == WHOLE


@pytest.mark.parametrize("stage", range(4))
def test_zero_goes_on_with_another_number_of_ranks(plan: Plan, observed: dict, stage: int) -> None:
    ranks = observed[f"regrouped {stage} until {WHOLE}"]
    assert ranks[0].refusal is None
    assert sorted(sample for rank in ranks for sample in rank.samples) == list(
        range(HALF * SAMPLES_A_STEP, WHOLE * SAMPLES_A_STEP)
    )
    assert plan.losses(f"regrouped {stage}") == pytest.approx(plan.losses(f"whole ZeRO {stage}, 2 ranks"), rel=1e-5)
    assert not list((plan.directory / f"regrouped {stage}" / "checkpoints").glob(".*"))


def test_zero_goes_on_with_another_stage_or_says_why_not(plan: Plan, observed: dict) -> None:
    assert plan.losses("stage 1 to 2") == pytest.approx(plan.losses("whole ZeRO 1, 2 ranks"), rel=1e-5)
    for name, named in (
        ("whole ZeRO 3, 2 ranks", "parallel.zero_stage=3"),
        ("whole DDP 2", "single, ddp or fsdp"),
        ("whole ZeRO 2, 2 ranks", "parallel.strategy=deepspeed"),
    ):
        for rank in observed[f"{name} until {WHOLE + 1}"]:
            assert named in rank.refusal


@pytest.mark.parametrize("stage", range(4))
def test_weights_of_a_zero_run_are_read_without_deepspeed(plan: Plan, observed: dict, stage: int) -> None:
    weights, expected = (
        load(plan.directory / name).state_dict() for name in (f"whole ZeRO {stage}, 2 ranks", "whole DDP 2")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=name)
