"""What fails on one rank alone ends all of them: none waits for one that is gone."""

import errno
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from caduceus.config import Config
from caduceus.data.loader import TrainLoader, ValidationLoader
from caduceus.data.reading import SampleReader
from caduceus.data.shard_files import ShardFiles
from caduceus.data.shard_samples import ShardSamples
from caduceus.distributed.ranks import Ranks
from caduceus.errors import ONE_LINE, Kind, NodeError, PeerError, RetryError, UserError, kind_of
from caduceus.run.directory import RunDirectory
from caduceus.train import loop, setup, trainer
from tests.distributed.ranks import on_ranks
from tests.distributed.recorder import Call, recording_threads
from tests.train.conftest import SmallRun, numbers

pytestmark = pytest.mark.slow


def no_space(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_in_the_end(*arguments: object, **options: object) -> None:
    time.sleep(2)  # by then the others wait in DeepSpeed's barrier
    no_space()


def third_is_unreadable(batches: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def taken(loader: Any) -> Any:
        for number, batch in enumerate(batches(loader), start=1):
            if number == 3:
                raise UserError("shard.tar: cannot be read")
            yield batch

    return taken


def lost_worker(*arguments: object, **options: object) -> None:
    raise RuntimeError("a worker was killed")


def other_order(samples: ShardSamples) -> dict[str, Any]:
    return {"elsewhere": True}


FAULTS = {
    "main's config.yaml": (0, RunDirectory, "keep_config", no_space, "cannot be read or written (.*No space left"),
    "main's metrics": (0, RunDirectory, "truncate_metrics", no_space, "cannot be read or written (.*No space left"),
    "main's provenance": (0, RunDirectory, "write_provenance", no_space, "cannot be read or written (.*No space left"),
    "main's checkpoints": (
        0,
        RunDirectory,
        "set_aside_damaged_checkpoints",
        no_space,
        "cannot be read or written (.*No space left",
    ),
    "a batch": (1, TrainLoader, "__iter__", third_is_unreadable(TrainLoader.__iter__), "shard.tar: cannot be read"),
    "a batch to validate on": (
        1,
        ValidationLoader,
        "__iter__",
        third_is_unreadable(ValidationLoader.__iter__),
        "shard.tar: cannot be read",
    ),
    "every read": (1, ShardFiles, "read_into", no_space, "10 other crops could not be read either"),
    "the model's check": (1, setup, "check_model", no_space, "No space left"),
    "other shards": (1, ShardSamples, "what_decides_the_order", other_order, "rank 1 on .*: data.path leads to other"),
    "a worker": (1, SampleReader, "read", lost_worker, "a worker was killed"),
    "DeepSpeed's file": (
        1,
        TorchCheckpointEngine,
        "save",
        no_space_in_the_end,
        "step 3 could not be written (.*No",
    ),
}
"""Rank, owner and name of what fails there, what takes its place, and the message of that rank."""
KINDS = {"the model's check": Kind.CRASH, "a worker": Kind.CRASH}
"""The kinds of failures that the user cannot correct."""


SAVED = "none"
"""A run without a fault, with checkpoints."""
SMALL: dict[str, dict[str, Any]] = {
    "model": {"d_model": 8, "n_layer": 1, "d_state": 2},
    "train": {"steps": 4, "global_batch": 8, "micro_batch": 2},
    "valid": {"every": 2, "samples": 16},
    "data": {"seq_len": 64},
}


def small(small_run: SmallRun, name: str, **sections: dict[str, Any]) -> Config:
    sections = {**SMALL, **sections}
    parallel = {"a worker": {"strategy": "ddp", "context": 2}, "DeepSpeed's file": {"strategy": "deepspeed"}}
    run = {"dir": str(small_run.directory / f"run {list(FAULTS).index(name)}")}
    return small_run.config(name, parallel=parallel.get(name, {"strategy": "fsdp"}), run=run, **sections)


def train_with_faults(rank: int, configs: dict[str, Config]) -> tuple[dict[str, Exception], dict[str, list[Call]]]:
    """What each fault ended in on this rank, and what it exchanged until then, in the order of each thread."""
    failures, exchanged = {}, {}
    for fault, (where, owner, name, replacement, _) in FAULTS.items():
        with pytest.MonkeyPatch.context() as patch, pytest.raises((*ONE_LINE, OSError, RuntimeError)) as failure:
            if rank == where:
                patch.setattr(owner, name, replacement)
            with recording_threads() as calls:
                trainer.train(configs[fault])
        failures[fault] = failure.value.with_traceback(None)
        exchanged[fault] = [thread for thread in calls if thread]
    with recording_threads() as calls:
        trainer.train(configs[SAVED])
    exchanged[SAVED] = [thread for thread in calls if thread]
    return failures, exchanged


def test_what_one_rank_meets_alone_ends_all(small_run: SmallRun) -> None:
    configs = {name: small(small_run, name) for name in FAULTS}
    configs[SAVED] = small_run.config(SAVED, parallel={"strategy": "fsdp"}, checkpoint={"every": 2}, **SMALL)
    ends = on_ranks(2, train_with_faults, configs)
    for fault in (*FAULTS, SAVED):
        # To a gathering or scattering, ranks give different amounts.
        ours, others = (
            [[(c.kind, c.ranks, c.kind in ("gather", "scatter") or c.bytes) for c in thread] for thread in of[fault]]
            for _, of in ends
        )
        assert ours == others, f"{fault}: ranks exchange different things"
        assert sum(map(len, ours)) > 2
    assert len(ends[0][1][SAVED]) > 1, "nothing was seen of the threads that save"
    for rank, (failures, _) in enumerate(ends):
        for fault, (where, *_, told) in FAULTS.items():
            failure, kind = failures[fault], KINDS.get(fault, Kind.USER)
            first, _, last = told.partition(".*")
            assert first in str(failure) and last in str(failure), (fault, rank, failure)
            if fault == "other shards":  # either rank may have the wrong ones
                assert (type(failure), failure.rank, failure.peer_kind) == (PeerError, where, kind)
            elif rank == where:
                assert kind_of(failure) is kind, fault
            else:
                assert (type(failure), failure.rank, failure.peer_kind) == (PeerError, where, kind), fault
                assert str(failure).startswith(f"rank {where} on {socket.gethostname()} failed: "), failure


def test_items_come_on_all_ranks_or_on_none() -> None:
    other = f"rank 1 on {socket.gethostname()} failed: ValueError: the third"
    assert on_ranks(2, take_together) == [([1, 2], other), ([1, 2], "the third")]


def test_of_several_failures_all_follow_the_weightiest() -> None:
    ends = on_ranks(4, fail_together)
    assert ends[0] == [("peer", 2), ("crash", None), ("peer", 1), ("peer", 3), ("user", None)]
    assert ends[1] == [("peer", 2), ("crash", None), ("retry", None), ("peer", 3), ("user", None)]
    assert ends[2] == [("user", None), ("crash", None), ("peer", 1), ("peer", 3), ("user", None)]
    assert ends[3] == [("crash", None), ("crash", None), ("peer", 1), ("node", None), ("user", None)]


def fail_together(rank: int) -> list[tuple[str, int | None]]:
    """The kind of each rank's end, and the rank that it follows, by what fails on which rank."""
    lost = PeerError("another rank that shares the sequence failed")
    cases = [
        {0: lost, 2: UserError("the mistake"), 3: RuntimeError("a crash")},
        dict.fromkeys(range(4), RuntimeError("all alike")),
        {1: RetryError("in use"), 3: lost},
        {0: lost, 1: lost, 2: lost, 3: NodeError("no GPU")},
        dict.fromkeys(range(4), UserError("all alike")),
    ]
    ranks, ends = Ranks(rank, 4, 1, torch.device("cpu")), []
    for errors in cases:
        with pytest.raises((*ONE_LINE, RuntimeError)) as failure, ranks.agreeing():
            if rank in errors:
                raise errors[rank]
        ends.append((kind_of(failure.value).value, getattr(failure.value, "rank", None)))
    with ranks.agreeing():
        pass
    return ends


def take_together(rank: int) -> tuple[list[int], str]:
    def items():
        yield from (1, 2)
        if rank == 1:
            raise ValueError("the third")
        yield 3

    ranks, taken = Ranks(rank, 2, 1, torch.device("cpu")), []
    with pytest.raises((PeerError, ValueError)) as failure:
        for item in ranks.together(items()):
            taken.append(item)
    return taken, str(failure.value)


def test_a_skipped_step_whose_samples_cannot_be_written_down_is_told_and_skipped(
    small_run: SmallRun, monkeypatch, caplog
) -> None:
    config = small_run.config("run", train={"steps": 3}, valid={"every": 0})
    step = loop.training_step

    def poisoned(config, strategy, loader, batches, progress, **handed):
        factor = float("nan") if progress.step == 1 else 1.0
        strategy.backward = lambda loss: (loss * factor).backward()
        return step(config, strategy, loader, batches, progress, **handed)

    monkeypatch.setattr(loop, "training_step", poisoned)
    monkeypatch.setattr(TrainLoader, "describe", no_space)
    assert trainer.train(config) == 0
    assert [row["skipped_steps"] for row in numbers(config.run.dir)] == [0, 1, 1]
    assert "step 2 skipped" in caplog.text
    assert "are g = [8, 9, 10, 11, 12, 13, 14, 15] ([Errno 28] No space left on device)" in caplog.text
    assert not list((Path(config.run.dir) / "logs").glob("skipped*"))
