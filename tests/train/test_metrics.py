"""What a training row tells of time: a slow rank shows, whichever part of its step is slow."""

import time
from statistics import median
from typing import Any

import pytest
import torch

from caduceus.config import Config
from caduceus.train import loop, trainer
from tests.distributed.ranks import on_ranks
from tests.train.conftest import SmallRun, numbers

SLOW = 0.2
"""Seconds in a step of the slow rank."""
STEPS = 4
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one micro-batch": ({"strategy": "ddp"}, {"global_batch": 4, "micro_batch": 2}),
    "two micro-batches": ({"strategy": "ddp"}, {"global_batch": 4, "micro_batch": 1}),
    "a strand each": ({"strategy": "ddp", "strands": 2}, {"global_batch": 4, "micro_batch": 4}),
    "ZeRO": ({"strategy": "deepspeed", "zero_stage": 1}, {"global_batch": 4, "micro_batch": 2}),
}


class _Slow(torch.autograd.Function):
    """The identity; its backward pass takes `SLOW` seconds."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(SLOW)
        return gradient


def slowed(where: str, rank: int, steps: list[dict[str, Any]]):
    """The trainer's step, of which a part is slow on `rank`; its rows go to `steps`."""
    step_of_the_trainer = loop.training_step

    def step(config, strategy, loader, batches, progress, **handed):
        def after_forward(module, inputs, output):
            if where == "forward":
                time.sleep(SLOW)
                return output
            return output._replace(loss_sum=_Slow.apply(output.loss_sum))

        hook = strategy.model.register_forward_hook(after_forward) if strategy.ranks.rank == rank else None
        row = step_of_the_trainer(config, strategy, loader, batches, progress, **handed)
        steps.append(row)
        if hook is not None:
            hook.remove()
        return row

    return step


def straggling(rank: int, configs: dict[tuple[str, str | None], Config]) -> dict[tuple[str, str | None], float]:
    found = {}
    for (layout, where), config in configs.items():
        steps: list[dict[str, Any]] = []
        with pytest.MonkeyPatch.context() as patch:
            if where is not None:
                patch.setattr(loop, "training_step", slowed(where, 1, steps))
            else:
                patch.setattr(loop, "training_step", slowed("nowhere", 9, steps))
            assert trainer.train(config) == 0
        found[layout, where] = median(row["straggler_seconds"] for row in steps[1:])
    return found


@pytest.mark.slow
def test_a_rank_that_is_slow_in_any_pass_shows_as_a_straggler(small_run: SmallRun) -> None:
    cases = [(layout, where) for layout in LAYOUTS for where in ("forward", "backward")] + [("one micro-batch", None)]
    configs = {
        (layout, where): small_run.config(
            f"{layout}, {where}",
            model={"d_model": 8, "n_layer": 1, "d_state": 2},
            train={"steps": STEPS, **LAYOUTS[layout][1]},
            parallel=LAYOUTS[layout][0],
            valid={"every": 0},
            data={"seq_len": 64},
        )
        for layout, where in cases
    }
    for rank in on_ranks(2, straggling, configs):
        for (layout, where), seconds in rank.items():
            slow = SLOW * (2 if layout == "two micro-batches" else 1)
            if where is None:
                assert seconds < SLOW / 2
            elif (layout, where) != ("a strand each", "forward"):  # its peer waits for the logits
                assert seconds > 0.8 * slow, (layout, where, seconds)
    untouched = numbers(configs["one micro-batch", None].run.dir)
    assert [row["loss"] for row in untouched] == [
        row["loss"] for row in numbers(configs["one micro-batch", "backward"].run.dir)
    ]
