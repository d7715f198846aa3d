"""How often ranks meet in a step beside what passes, clipping and DeepSpeed exchange, and how often a host reads what a
GPU would have to compute first: counted in the trainer's loop."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from caduceus.distributed.ranks import Ranks
from caduceus.train import loop, trainer
from tests.distributed.layouts import Layout, config_of
from tests.distributed.ranks import on_ranks
from tests.distributed.recorder import Call, Recorder

LAYOUTS = [Layout("ddp", 2, {"strategy": "ddp"}), Layout("fsdp", 2, {"strategy": "fsdp"})]
READERS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
ON_THE_HOST = ("caduceus.data.", "caduceus.ops.")
"""Batches are there when they are made, and so are the operands of the CPU's operators. (test_captured.py has it that
the passes on a GPU read nothing.)"""
STEPS = 5


class Host(torch.Tensor):
    """What has been read, and what is made of it."""


@contextlib.contextmanager
def reads() -> Iterator[list[str]]:
    """What the trainer reads of tensors that a GPU would compute."""
    found: list[str] = []

    def watched(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def reader(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith("caduceus.") and not caller.startswith(ON_THE_HOST) and type(tensor) is not Host:
                found.append(f"{name} in {caller}")
            return original(tensor, *arguments, **options)

        return reader

    def gather(ranks: Ranks, numbers: Any) -> torch.Tensor:
        return original_gather(ranks, numbers).as_subclass(Host)

    original_gather = Ranks.gather
    with pytest.MonkeyPatch.context() as patch:
        for name in READERS:
            patch.setattr(torch.Tensor, name, watched(name))
        patch.setattr(Ranks, "gather", gather)
        yield found


def watched_steps(rank: int, configs: list[Any]) -> list[list[tuple[list[Call], list[str]]]]:
    """Collectives and reads of each turn of the loop, from one step's beginning to the next one's."""
    return [_watched(config) for config in configs]


def _watched(config: Any) -> list[tuple[list[Call], list[str]]]:
    step, turns = loop.training_step, []

    def marked(*arguments: Any, **handed: Any) -> Any:
        turns.append((len(recorder.calls), len(found)))
        return step(*arguments, **handed)

    with pytest.MonkeyPatch.context() as patch, Recorder() as recorder, reads() as found:
        patch.setattr(loop, "training_step", marked)
        assert trainer.train(config) == 0
    turns.append((len(recorder.calls), len(found)))
    return [(recorder.calls[a:b], found[c:d]) for (a, c), (b, d) in itertools.pairwise(turns)]


@pytest.mark.moderate
def test_ranks_meet_once_a_step_and_a_host_reads_once(small_shards: Path, tmp_path: Path) -> None:
    """Beside the exchanges of passes and clipping. The first step agrees on failures at once, DDP tells in the second
    how it orders gradients, and after the last no step follows that its row could wait for."""
    configs = [config_of(layout, small_shards, tmp_path / layout.name, 2, steps=STEPS) for layout in LAYOUTS]
    for config in configs:
        config.monitor.every = 3  # what the network told in the third step goes with the fourth
    for layout, one, other in zip(LAYOUTS, *on_ranks(2, watched_steps, configs), strict=True):
        assert one == other, "ranks exchange and read different things"
        assert [len(read) for _, read in one[:-1]] == [2, 1, 1, 1] and len(one) == STEPS
        for calls, _ in one[2:-1]:
            kinds = [call.kind for call in calls]
            assert kinds[0] == "all-reduce" and calls[0].bytes == 8, "the weight of the labels, which nobody reads"
            assert kinds[-2:] == ["all-reduce", "all-gather"], "of gradients or their norm, and what all tell all"
            assert set(kinds[1:-2]) == ({"all-gather", "reduce-scatter"} if layout.name == "fsdp" else set())
