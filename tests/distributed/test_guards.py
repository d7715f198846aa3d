"""What one rank meets, all skip or go back for together, under every layout: to the run that never met it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from caduceus.config import Config
from caduceus.data.loader import TrainLoader
from caduceus.distributed.strategy import Strategy
from caduceus.train import guards, loop, trainer
from tests.distributed.layouts import LAYOUTS, Layout, config_of
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.slow

NAN_LOSS, NAN_GRADIENT, LEAP = 8, 16, 48
"""Samples consumed before the step that is struck: the 2nd and 3rd on one rank, the 7th on all."""
EXECUTED = [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10]
"""Steps in their order: the 7th, three after a checkpoint, is a leap of the loss."""
STRUCK = [
    *(layout for layout in LAYOUTS if layout.world <= 2),
    Layout("ZeRO 2, offloaded", 2, {"strategy": "deepspeed", "zero_stage": 2, "cpu_offload": True}),
    Layout("ZeRO 3, offloaded", 2, {"strategy": "deepspeed", "zero_stage": 3, "cpu_offload": True}),
]


@dataclass
class Step:
    """What a rank saw of a step: its row of the metrics, and all parameters (whole) before and after."""

    row: dict[str, Any]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def config(layout: Layout, shards: Path, directory: Path, steps: int) -> Config:
    """At a constant learning rate, so that an update does not depend on how many steps were skipped before it."""
    train = {"steps": steps, "lr": 4e-3, "min_lr": 4e-3, "warmup_steps": 1, "spike_factor": 3.0}
    config = config_of(layout, shards, directory, 2, **train)
    config.checkpoint.every = 4
    config.run.allow_change = ["train.steps"]
    return config


def train_struck(rank: int, configs: list[Config]) -> list[list[Step]]:
    return [_train_observed(config, rank, strike=True) for config in configs]


def _train_observed(config: Config, rank: int, strike: bool) -> list[Step]:
    steps = []
    step_of_the_trainer = loop.training_step

    def observed_step(config, strategy, loader, batches, progress, **handed):
        before = whole_parameters(strategy)
        with pytest.MonkeyPatch.context() as patch:
            if strike:
                _strike(patch, strategy, loader.samples_consumed)
            row = step_of_the_trainer(config, strategy, loader, batches, progress, **handed)
        steps.append(Step(row, before, whole_parameters(strategy)))
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", observed_step)
        patch.setattr(guards, "LOSS_MEMORY", 3)
        assert trainer.train(config) == 0
    return steps


def _strike(patch: pytest.MonkeyPatch, strategy: Strategy, consumed: int) -> None:
    model, backward = strategy.model, strategy.backward
    forward = model.forward

    def scaled(factor: float) -> Any:
        def scaled_forward(*arguments: Any, **options: Any) -> Any:
            output = forward(*arguments, **options)
            return output._replace(loss_sum=output.loss_sum * factor)

        return scaled_forward

    last = strategy.ranks.rank == strategy.ranks.world - 1
    if consumed == LEAP:
        patch.setattr(model, "forward", scaled(100))
    elif consumed == NAN_LOSS and last:
        patch.setattr(model, "forward", scaled(float("nan")))
    elif consumed == NAN_GRADIENT and last:
        patch.setattr(strategy, "backward", lambda loss: backward(loss * float("nan")))


def whole_parameters(strategy: Strategy) -> dict[str, Tensor]:
    """Copies of all parameters, on every rank; all call it together."""
    wholes = {}
    for name, parameter in getattr(strategy.model, "module", strategy.model).named_parameters():
        if isinstance(parameter, DTensor):
            wholes[name] = parameter.detach().full_tensor().clone()
        elif hasattr(parameter, "ds_id"):
            with strategy._whole(parameter):
                wholes[name] = parameter.detach().clone()
        else:
            wholes[name] = parameter.detach().clone()
    return wholes


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("struck")


@pytest.fixture(scope="module")
def runs(small_shards: Path, directory: Path) -> dict[str, list[list[Step]]]:
    """The steps that were executed under each layout, by rank."""
    runs = {}
    for world in (1, 2):
        layouts = [layout for layout in STRUCK if layout.world == world]
        configs = [config(layout, small_shards, directory / layout.name, 10) for layout in layouts]
        of_ranks = on_ranks(world, train_struck, configs)
        runs |= {layout.name: list(ranks) for layout, ranks in zip(layouts, zip(*of_ranks, strict=True), strict=True)}
    return runs


@pytest.fixture(scope="module")
def expected(small_shards: Path, directory: Path) -> list[float]:
    """Losses of one undisturbed process that is given only the samples of the steps that count: 1, 4, and 5 to 10."""
    losses = []
    for until, passed_over in ((1, 0), (2, 16), (8, 24)):
        load_state = TrainLoader.load_state

        def load_later(loader, state, load_state=load_state, passed_over=passed_over):
            load_state(loader, {**state, "samples_consumed": state["samples_consumed"] + passed_over})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainLoader, "load_state", load_later)
            leg = config(STRUCK[0], small_shards, directory / "expected", until)
            losses += [step.row["loss"] for step in _train_observed(leg, 0, strike=False)]
    return losses


@pytest.fixture(params=STRUCK, ids=lambda layout: layout.name)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


def test_all_ranks_decide_the_same(runs: dict, layout: Layout) -> None:
    for steps in runs[layout.name]:
        assert [step.row["step"] for step in steps] == EXECUTED
        assert [step.row["samples"] for step in steps] == [8 * number for number in range(1, 14)]
        assert [step.row["skipped_steps"] for step in steps] == [0, 1, 2, 2, 2, 2] + 7 * [3]
        finite = [[torch.tensor(step.row[name]).isfinite() for step in steps] for name in ("loss", "grad_norm")]
        assert finite == [[True, False] + 11 * [True], [True, False, False] + 10 * [True]]


def test_a_skipped_step_touches_no_parameter_on_any_rank(runs: dict, layout: Layout) -> None:
    for steps in runs[layout.name]:
        for place, step in enumerate(steps):
            untouched = all(torch.equal(step.before[name], after) for name, after in step.after.items())
            assert untouched == (place in (1, 2, 6)), place


def test_a_rewind_brings_back_the_parameters_of_the_checkpoint(runs: dict, layout: Layout) -> None:
    for steps in runs[layout.name]:
        saved, moved, restored = steps[3].after, steps[6].after, steps[7].before
        assert saved.keys() == restored.keys()
        for name, parameter in saved.items():
            assert torch.equal(restored[name], parameter) and not torch.equal(moved[name], parameter), name


def test_the_steps_that_count_are_those_of_an_undisturbed_run(
    runs: dict, expected: list[float], layout: Layout, directory: Path
) -> None:
    rows = [json.loads(line) for line in (directory / layout.name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    # fp32 sums in another order over ranks.
    assert [row["loss"] for row in rows if row["step"] not in (2, 3)] == pytest.approx(expected, rel=1e-5)


def test_the_ranks_that_met_it_name_the_samples(runs: dict, layout: Layout, directory: Path) -> None:
    named: dict[int, dict[int, list[int]]] = {2: {}, 3: {}, 7: {}}
    for path in (directory / layout.name / "logs").glob("skipped-rank*.jsonl"):
        for report in map(json.loads, path.read_text().splitlines()):
            named[report["step"]][report["rank"]] = [sample["g"] for sample in report["samples"]]
    assert named[2].keys() == {layout.world - 1}
    for step in (3, 7):
        assert named[step].keys() == set(range(layout.world))
        first = (step - 1) * 8
        assert {g for samples in named[step].values() for g in samples} == set(range(first, first + 8))
