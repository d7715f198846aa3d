"""The guards in one process: what they skip, where they go back to, when they give up."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

from caduceus.config import TrainConfig
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from caduceus.train import guards, loop, trainer
from caduceus.train.guards import LOSS_MEMORY, MAX_REWINDS, Health
from tests.train.conftest import SmallRun, numbers


def settled(loss: float = 1.0) -> Health:
    health = Health()
    for _ in range(LOSS_MEMORY):
        assert health.may_update(loss, 1.0, TrainConfig(spike_factor=2.0))
    return health


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_does_not_update(loss: float, grad_norm: float) -> None:
    health = settled()
    mean = health.mean_loss
    assert not health.may_update(loss, grad_norm, TrainConfig(spike_factor=2.0))
    assert (health.skipped_steps, health.consecutive_skips, health.spiked, health.mean_loss) == (1, 1, False, mean)
    assert health.may_update(1.0, 1.0, TrainConfig())
    assert (health.skipped_steps, health.consecutive_skips) == (1, 0)


def test_a_spike_is_a_multiple_of_the_running_mean_once_there_is_one() -> None:
    config = TrainConfig(spike_factor=2.0)
    assert Health().may_update(100.0, 1.0, config)
    health = settled(1.0)
    assert health.may_update(1.9, 1.0, config)
    assert not health.may_update(2.1, 1.0, config) and health.spiked
    assert health.may_update(2.1, 1.0, TrainConfig(spike_factor=0.0)) and not health.spiked


@pytest.mark.moderate
def test_too_many_skips_in_a_row_end_the_run_and_name_the_samples(small_run: SmallRun, monkeypatch) -> None:
    config = small_run.config("poisoned", train={"steps": 8, "max_skipped_steps": 2}, valid={"every": 0})
    poison(monkeypatch, first=4)
    complete = RunDirectory.complete_checkpoint
    monkeypatch.setattr(RunDirectory, "complete_checkpoint", lambda *given: (time.sleep(1), complete(*given))[1])
    with pytest.raises(UserError, match=r"train\.max_skipped_steps: .* 3 steps in a row; .*skipped-rank\*\.jsonl"):
        trainer.train(config)
    lines = (Path(config.run.dir) / "logs" / "skipped-rank0.jsonl").read_text().splitlines()
    reports = [json.loads(line) for line in lines]
    assert [report["step"] for report in reports] == [4, 5, 6]
    assert sorted(sample["g"] for sample in reports[0]["samples"]) == list(range(24, 32))
    assert [row["grad_norm"] is None for row in numbers(config.run.dir)] == [False] * 3 + [True] * 3
    assert RunDirectory(config.run.dir).checkpoints()[-1].step == 3


@pytest.mark.moderate
def test_a_skipped_step_leaves_the_parameters_alone(small_run: SmallRun, monkeypatch) -> None:
    config = small_run.config("skipping", train={"steps": 3}, checkpoint={"every": 1, "keep": 0}, valid={"every": 0})
    poison(monkeypatch, first=2, last=2)
    trainer.train(config)
    before, after, later = (weights(config.run.dir, step) for step in (1, 2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in after)


@pytest.mark.moderate
def test_a_spike_rewinds_to_the_checkpoint_and_goes_on_with_later_samples(small_run: SmallRun, monkeypatch) -> None:
    monkeypatch.setattr(guards, "LOSS_MEMORY", 3)
    train = {"steps": 8, "spike_factor": 3.0}
    config = small_run.config("spiking", train=train, valid={"every": 0}, checkpoint={"every": 2})
    raise_loss(monkeypatch, of_samples={48})  # a sample of step 7, one after the checkpoint of step 6
    assert trainer.train(config) == 0
    rows = numbers(config.run.dir)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["samples"] for row in rows] == [8, 16, 24, 32, 40, 48, 64, 72]
    assert [row["skipped_steps"] for row in rows] == [0] * 6 + [1] * 2
    (report,) = (Path(config.run.dir) / "logs" / "skipped-rank0.jsonl").read_text().splitlines()
    assert json.loads(report)["reason"] == "the loss jumped"


@pytest.mark.moderate
def test_a_sample_whose_loss_is_not_finite_is_named_alone(small_run: SmallRun, monkeypatch) -> None:
    config = small_run.config("nan", train={"steps": 2, "max_skipped_steps": 1}, valid={"every": 0})
    step_of_the_trainer, seen = loop.training_step, []

    def striking(config, strategy, loader, batches, progress, **handed):
        def passing_by():
            for batch in batches:
                seen.append(batch.g)
                yield batch

        def struck(module, inputs, output):
            sums = output.loss_sum.clone()
            sums[seen.pop(0) == 11] = float("nan")  # one of the second step
            return output._replace(loss_sum=sums)

        hook = strategy.model.register_forward_hook(struck)
        try:
            return step_of_the_trainer(config, strategy, loader, passing_by(), progress, **handed)
        finally:
            hook.remove()

    monkeypatch.setattr(loop, "training_step", striking)
    assert trainer.train(config) == 0
    (report,) = (Path(config.run.dir) / "logs" / "skipped-rank0.jsonl").read_text().splitlines()
    (sample,) = json.loads(report)["samples"]
    assert sample["g"] == 11 and sample["end"] - sample["start"] == 128


@pytest.mark.moderate
def test_a_loss_that_always_jumps_ends_the_run(small_run: SmallRun, monkeypatch) -> None:
    monkeypatch.setattr(guards, "LOSS_MEMORY", 3)
    train = {"steps": 8, "spike_factor": 3.0}
    config = small_run.config("leaping", train=train, valid={"every": 0}, checkpoint={"every": 4})
    raise_loss(monkeypatch, of_samples=set(range(40, 200)))
    with pytest.raises(UserError, match=rf"train\.spike_factor: after {MAX_REWINDS} rewinds"):
        trainer.train(config)
    assert len(numbers(config.run.dir)) == 5  # the checkpoint's four, and the last spike


def poison(monkeypatch: pytest.MonkeyPatch, first: int, last: int = 1_000) -> None:
    """Multiply the gradients of some steps by NaN."""
    step_of_the_trainer = loop.training_step

    def poisoned(config, strategy, loader, batches, progress, **handed):
        factor = float("nan") if first <= progress.step + 1 <= last else 1.0
        strategy.backward = lambda loss: (loss * factor).backward()
        return step_of_the_trainer(config, strategy, loader, batches, progress, **handed)

    monkeypatch.setattr(loop, "training_step", poisoned)


def raise_loss(monkeypatch: pytest.MonkeyPatch, of_samples: set[int]) -> None:
    """Multiply the loss of batches with any of these samples by 100."""
    step_of_the_trainer = loop.training_step

    def leaping(config, strategy, loader, batches, progress, **handed):
        seen: list[int] = []

        def passing_by():
            for batch in batches:
                seen.extend(batch.g.tolist())
                yield batch

        def raised(module, inputs, output):
            return output._replace(loss_sum=output.loss_sum * (100 if of_samples & set(seen) else 1))

        hook = strategy.model.register_forward_hook(raised)
        try:
            return step_of_the_trainer(config, strategy, loader, passing_by(), progress, **handed)
        finally:
            hook.remove()

    monkeypatch.setattr(loop, "training_step", leaping)


def weights(run_directory: str, step: int) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = Path(run_directory) / f"weights-{step}.pt"
    dcp_to_torch_save(RunDirectory(run_directory).checkpoint_path(step), path)
    return torch.load(path)["model"]
