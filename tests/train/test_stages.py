"""A run in stages: each with its own length, batch and rate, and the same bits wherever the run was stopped."""

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from caduceus import hub
from caduceus.config import Config, config_from_dict, config_to_dict, save_config, stages_of
from caduceus.data import build_loader
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.monitor.view import View
from caduceus.run.directory import RunDirectory
from caduceus.train import loop, trainer
from caduceus.train.checkpointing import load_checkpoint
from caduceus.train.guards import Health
from caduceus.train.optimizer import build_optimizer
from caduceus.train.stopping import EXIT_REQUEUE, StopRequest
from caduceus.train.trainer import train
from launch.refusals import complaints
from launch.request import JobRequest
from launch.slurm import described_estimates
from tests.conftest import REPOSITORY
from tests.distributed.layouts import LAYOUTS, train_all
from tests.train.conftest import SmallRun, numbers

SHORT = {"seq_len": 64, "global_batch": 8, "micro_batch": 4, "steps": 4, "lr": 4e-3}
LONG = {"seq_len": 256, "global_batch": 2, "micro_batch": 1, "steps": 3, "lr": 2e-3, "warmup_steps": 1}
DDP = {"strategy": "ddp"}


def staged(small_run: SmallRun, name: str, *stages: dict[str, Any], **sections: dict[str, Any]) -> Config:
    stages = stages or (SHORT, LONG)
    sections = {"valid": {"every": 3, "samples": 4}, "checkpoint": {"every": 1, "keep": 0}, **sections}
    steps = sum(stage["steps"] for stage in stages)
    return small_run.config(name, **sections, train={"steps": steps, "stages": list(stages)})


def goes_on_after(whole: Config, step: int) -> Config:
    """The run as a kill left it that came after the checkpoint of `step`."""
    config = config_from_dict(config_to_dict(whole))
    config.run.dir = f"{whole.run.dir}-killed-after-{step}"
    shutil.copytree(whole.run.dir, config.run.dir, symlinks=True)
    run = RunDirectory(config.run.dir)
    for checkpoint in run.checkpoints():
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    return config


def weights(config: Config) -> dict[str, torch.Tensor]:
    return hub.load(config.run.dir).state_dict()


def assert_same_run(one: Config, other: Config) -> None:
    assert numbers(one.run.dir) == numbers(other.run.dir)
    found, expected = weights(one), weights(other)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module", autouse=True)
def garbage_stays() -> Iterator[None]:
    """Collecting all of it takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *_: 0)
        yield


@pytest.fixture(scope="module")
def whole(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An undisturbed run of two stages."""
    config = staged(SmallRun(small_shards, tmp_path_factory.mktemp("whole")), "whole")
    assert train(config) == 0
    return config


@pytest.mark.moderate
@pytest.mark.parametrize("step", [3, 4, 5], ids=["before the border", "at the border", "after the border"])
def test_a_run_killed_near_the_border_goes_on_to_the_same_bits(whole: Config, step: int) -> None:
    config = goes_on_after(whole, step)
    assert train(config) == 0
    assert_same_run(config, whole)


@pytest.mark.moderate
def test_a_stop_as_a_stage_ends_is_a_stop_of_the_run(
    small_run: SmallRun, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, taken, step = staged(small_run, "stopped"), [0], loop.training_step

    def counted(*arguments: Any, **named: Any) -> None:
        step(*arguments, **named)
        taken[0] += 1

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", counted)
        patch.setattr(StopRequest, "requested", property(lambda _: taken[0] == 4))
        assert train(config) == EXIT_REQUEUE
    assert [checkpoint.step for checkpoint in RunDirectory(config.run.dir).checkpoints()] == [1, 2, 3, 4]
    assert train(config) == 0
    assert_same_run(config, whole)


@pytest.mark.moderate
def test_a_failure_as_the_next_stage_begins_loses_nothing(
    small_run: SmallRun, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = staged(small_run, "failed", checkpoint={"every": 100, "keep": 1})

    def fails(*_: Any) -> None:
        raise RuntimeError("as the stage begins")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "open_stage", fails)
        with pytest.raises(RuntimeError, match="as the stage begins"):
            train(config)
    assert [checkpoint.step for checkpoint in RunDirectory(config.run.dir).checkpoints()] == [4]
    assert train(config) == 0
    assert_same_run(config, whole)
    assert [checkpoint.step for checkpoint in RunDirectory(config.run.dir).checkpoints()] == [4, 7], "4 ends a stage"


@pytest.mark.moderate
def test_rows_and_checkpoints_tell_the_stage(whole: Config) -> None:
    run = RunDirectory(whole.run.dir)
    rows = [row for row in numbers(run.path) if "loss" in row]
    assert [row["stage"] for row in rows] == [1] * 4 + [2] * 3
    assert [row["samples"] for row in rows] == [8, 16, 24, 32, 34, 36, 38]
    assert [row["tokens"] for row in rows] == [*range(512, 2049, 512), *range(2560, 3585, 512)]
    validated = [(row["step"], row["stage"]) for row in numbers(run.path) if "valid_loss" in row]
    assert validated == [(3, 1), (4, 1), (6, 2), (7, 2)]  # every third, and the last of each stage
    for checkpoint in run.checkpoints():
        stage = 1 if checkpoint.step <= 4 else 2
        assert json.loads((checkpoint.path / "COMPLETE").read_text())["stage"] == stage
        assert json.loads((checkpoint.path / "progress.json").read_text())["stage"] == stage
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    kinds = [(event["event"], event["step"]) for event in events if event["event"] != "checkpoint"]
    assert kinds == [("start", 0), ("stage", 4), ("finished", 7)] and len(run.starts()) == 1
    fingerprints = [build_loader(stage.config).fingerprint for stage in stages_of(whole)]
    assert [run.stages()[number]["data_fingerprint"] for number in "12"] == fingerprints
    hub.save_published(hub.load(run.path), run.path / "card", run.path)
    assert "| sequence length | 64, then 256 |" in (run.path / "card" / "README.md").read_text()


@pytest.mark.moderate
def test_a_stage_is_to_its_samples_and_rates_what_a_run_of_its_own_would_be(small_run: SmallRun, whole: Config) -> None:
    keys = {**LONG, "seed": 1}  # grows by one with each stage
    alone = small_run.config("alone", data={"seq_len": keys.pop("seq_len")}, train=keys, valid={"every": 0})
    second = stages_of(whole)[1].config
    for mine, its in itertools.islice(zip(build_loader(second), build_loader(alone), strict=True), 4):
        assert torch.equal(mine.g, its.g) and torch.equal(mine.input_ids, its.input_ids)
        assert torch.equal(mine.labels, its.labels)

    at_the_border, batches = hub.load(RunDirectory(whole.run.dir).checkpoint_path(4)), build_loader(alone)
    with torch.no_grad():
        outputs = [at_the_border(b.input_ids, b.labels) for b, _ in zip(batches, range(2), strict=False)]
    loss = sum(o.loss_sum.sum() for o in outputs) / sum(o.weight_sum.sum() for o in outputs)
    rows = [row for row in numbers(whole.run.dir) if "loss" in row]
    assert rows[4]["loss"] == pytest.approx(loss.item(), rel=1e-5)

    assert train(alone) == 0
    assert [row["lr"] for row in rows[4:]] == [row["lr"] for row in numbers(alone.run.dir)]


def test_the_optimizer_goes_on_through_the_border(whole: Config) -> None:
    strategy = build_strategy(stages_of(whole)[1].config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer)
    load_checkpoint(RunDirectory(whole.run.dir).newest_valid_checkpoint(), strategy)
    assert {int(state["step"]) for state in strategy.optimizer.state.values()} == {7}


@pytest.mark.moderate
def test_a_spike_after_the_border_goes_back_to_it(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = staged(small_run, "spiked", checkpoint={"every": 100}, valid={"every": 0})
    may_update, calls = Health.may_update, itertools.count(1)

    def spikes_in_the_fifth(self: Health, *arguments: Any) -> bool:
        allowed = may_update(self, *arguments)
        self.spiked = next(calls) == 5
        return allowed and not self.spiked

    monkeypatch.setattr(Health, "may_update", spikes_in_the_fifth)
    assert train(config) == 0
    rows = numbers(config.run.dir)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["samples"] for row in rows[3:]] == [32, 36, 38, 40]  # on with those that follow the spike


@pytest.mark.moderate
def test_stages_to_come_may_change_and_those_begun_may_not(small_run: SmallRun) -> None:
    short = {**SHORT, "steps": 2}
    config = staged(small_run, "run", short, valid={"every": 0})
    assert train(config) == 0

    other = staged(small_run, "run", short, LONG, valid={"every": 0})
    with pytest.raises(UserError, match=r"holds a run with train\.stages=\[\{.*run\.allow_change=\[train\.stages\]$"):
        train(other)
    other.run.allow_change = ["train.stages"]
    assert train(other) == 0
    assert [row["stage"] for row in numbers(other.run.dir)] == [1, 1, 2, 2, 2]

    for key, stages in (
        ("train.steps=2, not 3", ({**short, "steps": 3}, LONG)),
        ("data.seq_len=256, not 128", (short, {**LONG, "seq_len": 128})),
        ("train.lr=0.002, not 0.001", (short, {**LONG, "lr": 1e-3})),
    ):
        changed = staged(small_run, "run", *stages, valid={"every": 0})
        changed.run.allow_change = ["train.stages"]
        with pytest.raises(UserError, match=rf"^train\.stages: stage [12] has begun with {key}; give it as it was"):
            train(changed)
    fewer = staged(small_run, "run", {**SHORT, "steps": 1}, valid={"every": 0})
    fewer.run.allow_change = ["train.stages"]
    with pytest.raises(UserError, match=r"^train\.stages: the run is in stage 2, but there are 1; give it as it was$"):
        train(fewer)
    smaller = staged(small_run, "run", short, {**LONG, "micro_batch": 2}, valid={"every": 0})
    smaller.run.allow_change = ["train.stages"]
    assert train(smaller) == 0


def test_what_a_later_stage_would_be_refused_for_is_told_before_the_first(small_run: SmallRun) -> None:
    config = staged(small_run, "run", SHORT, {**LONG, "seq_len": 4096})
    with pytest.raises(UserError, match=r"^train\.stages: stage 2: data\.seq_len: 4096 bases, but the longest window"):
        train(config)
    assert not Path(config.run.dir).exists()
    assert complaints(config, JobRequest(executor="local"))[0].startswith("train.stages: stage 2: data.seq_len: 4096")
    lines = described_estimates(config, JobRequest(executor="local"))
    assert [line[:17] for line in lines] == ["stage 1, 4 steps:", "stage 2, 3 steps:"]
    assert "256 bases at a time" in lines[0] and "4,096 bases at a time" in lines[1]


def test_time_left_counts_the_bases_of_later_stages(whole: Config) -> None:
    run = RunDirectory(whole.run.dir)
    long = {**LONG, "global_batch": 8}
    values = config_to_dict(whole)
    values["train"] |= {"stages": [SHORT, long], "steps": 7}
    view = View.of(run, "run", config_from_dict(values))
    for step in range(1, 4):
        row = {"step": step, "stage": 1, "loss": 1.0, "seconds": 2.0, "tokens_per_second": 256.0}
        view.take(row, now=2.0 * step)
    assert view.seconds_left == pytest.approx((1 + 3 * 4) * 2.0)  # a step of the second has four times the bases


@pytest.mark.slow
def test_ranks_share_each_stage_as_its_batch_demands_and_stop_at_the_border(
    small_shards: Path, tmp_path: Path, small_run: SmallRun
) -> None:
    """Under DDP the second stage has a sequence a step, whose strands the two ranks share."""
    long = {**LONG, "global_batch": 1}
    single, whole = (
        staged(small_run, name, SHORT, long, valid={"every": 0}, parallel={"strategy": strategy})
        for name, strategy in (("single", "single"), ("whole", "ddp"))
    )
    assert train(single) == 0
    train_all(2, [whole])
    layouts = [RunDirectory(whole.run.dir).stages()[number] for number in "12"]
    assert [(layout["ranks"], layout["strands"]) for layout in layouts] == [(2, 1), (2, 2)]
    losses = [[row["loss"] for row in numbers(config.run.dir)] for config in (single, whole)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    killed = [goes_on_after(whole, step) for step in (3, 4, 5)]
    train_all(2, killed)
    for config in killed:
        assert_same_run(config, whole)


@pytest.mark.slow
def test_torchrun_killed_at_either_border_goes_on_to_the_same_bits(small_shards: Path, tmp_path: Path) -> None:
    """Its ranks are killed as the second stage begins, and again while the last checkpoint of it is written."""
    third = {**LONG, "seq_len": 512, "global_batch": 1, "steps": 2}
    whole, broken = (
        staged(SmallRun(small_shards, tmp_path), name, SHORT, LONG, third, checkpoint={"every": 100}, parallel=DDP)
        for name in ("whole", "broken")
    )
    train_all(2, [whole])
    save_config(broken, tmp_path / "broken.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.train.killed_at_border", str(tmp_path / "broken.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for moment, steps in (("saved", [4]), ("saving", [4]), ("never", [4, 7, 9])):
        started = subprocess.run([*command, moment], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert (started.returncode == 0) == (moment == "never"), started.stderr
        assert moment == "never" or "SIGKILL" in started.stderr
        assert [checkpoint.step for checkpoint in RunDirectory(broken.run.dir).checkpoints()] == steps
    assert_same_run(broken, whole)
    assert len(RunDirectory(broken.run.dir).starts()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["FSDP 2", "ZeRO 1, 2 ranks", "ZeRO 3, 2 ranks"])
def test_shards_go_on_across_the_border(layout: str, small_run: SmallRun) -> None:
    """The whole run's losses; killed at the border, the same bits."""
    (parallel,) = (one.parallel for one in LAYOUTS if one.name == layout)
    short, long = {**SHORT, "steps": 1, "warmup_steps": 1}, {**LONG, "steps": 1}
    short["micro_batch"] = long["micro_batch"] = 1
    runs = [
        staged(small_run, name, short, long, valid={"every": 0}, parallel=parallel if name == "shards" else {})
        for name in ("one", "shards")
    ]
    single, shards = runs
    assert train(single) == 0
    train_all(2, [shards])
    losses = [[row["loss"] for row in numbers(config.run.dir)] for config in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    killed = goes_on_after(shards, 1)
    train_all(2, [killed])
    assert_same_run(killed, shards)
