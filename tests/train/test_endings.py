"""A rank that fails is heard, recorded and gone within seconds, whatever the others wait for."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from caduceus.config import Config, save_config
from caduceus.data.loader import TrainLoader
from caduceus.distributed import strategy
from caduceus.distributed.fsdp import FSDP
from caduceus.errors import Kind, RetryError, UserError
from caduceus.monitor.rows import Monitor
from caduceus.run.ends import End, first_cause, read_ends, recording_end
from caduceus.train import __main__, loop, setup, trainer
from tests.distributed.ranks import free_port, start_server
from tests.train.conftest import SmallRun

pytestmark = pytest.mark.slow

KILLED_AFTER = 4.0
"""Seconds between the first exit and the kill of the others by what started them."""
LIMIT = 10.0
"""Seconds from a failure to the end of the last rank."""


@dataclass(frozen=True)
class Fault:
    """What raises what on rank 1, at which call; `kind`, `told` and `status` are how that rank is to end."""

    owner: Any
    name: str
    error: BaseException
    kind: Kind
    told: str
    status: int
    calls: int = 1


FAULTS = {
    "the user's mistake": Fault(setup, "check_model", UserError("ops.backend: no"), Kind.USER, "ops.backend: no", 2),
    "another holds the run": Fault(setup, "build_loader", RetryError("run.dir: busy"), Kind.RETRY, "run.dir: busy", 2),
    "exception in the start": Fault(setup, "build_strategy", KeyError("weight"), Kind.CRASH, "KeyError: 'weight'", 1),
    "exception in the loader": Fault(TrainLoader, "state", ValueError("torn"), Kind.CRASH, "ValueError: torn", 1, 4),
    "out of memory": Fault(
        FSDP, "backward", torch.OutOfMemoryError("CUDA out of memory."), Kind.USER, "lower train.micro_batch", 2, 3
    ),
    "exception in a step": Fault(FSDP, "clip", IndexError("of range"), Kind.CRASH, "IndexError: of range", 1, 2),
    "exception in a save": Fault(strategy._Writer, "write_data", OSError("no disk"), Kind.USER, "no disk", 2),
    "exception in validation": Fault(trainer, "held_out_loss", ZeroDivisionError("no"), Kind.CRASH, "DivisionError", 1),
    "exception behind a step": Fault(Monitor, "log_training", TypeError("a row"), Kind.CRASH, "TypeError: a row", 1, 2),
    "Ctrl-C": Fault(loop, "collect_garbage", KeyboardInterrupt(), Kind.CRASH, "KeyboardInterrupt", 130, 2),
}


@dataclass
class Ending:
    """How the ranks of a run ended: statuses, stderr and records by rank, and seconds since the failure."""

    statuses: list[int | None]
    messages: list[str]
    ends: dict[int, End]
    seconds: float


def failing_run(config: Config, name: str) -> Ending:
    """Train on two ranks as the command does, with a failure on the last; destroying a group waits for all ranks."""
    directory = Path(config.run.dir)
    save_config(config, directory.with_suffix(".yaml"))
    start_server()
    context = multiprocessing.get_context("forkserver")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [context.Process(target=train_on, args=(rank, place, directory, name)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    wait([rank.sentinel for rank in ranks], timeout=120)
    wait_for_all(ranks, KILLED_AFTER)
    ended = time.time()
    for rank in ranks:
        rank.kill()  # as srun and torchrun do where a rank still waits for the one that is gone
        rank.join()
    failed = float(directory.with_suffix(".failed").read_text())
    messages = [directory.with_suffix(f".{rank}.log").read_text() for rank in range(2)]
    statuses, ends = [rank.exitcode for rank in ranks], read_ends(directory.with_suffix(".ends"))
    return Ending(statuses, messages, ends, ended - failed)


def wait_for_all(ranks: list[multiprocessing.Process], seconds: float) -> None:
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))


def train_on(rank: int, place: dict[str, str], directory: Path, name: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    log = os.open(directory.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dist.destroy_process_group = wait_for_the_others
    if rank == 1:
        break_it(FAULTS[name], directory.with_suffix(".failed"))
    sys.argv = ["train", "--config", str(directory.with_suffix(".yaml"))]
    with recording_end(directory.with_suffix(".ends"), rank):
        __main__.command()


def wait_for_the_others() -> None:
    """As NCCL does, which destroys its communicators on all ranks together."""
    dist.barrier()
    time.sleep(600)


def break_it(fault: Fault, note: Path) -> None:
    whole: Callable[..., Any] = getattr(fault.owner, fault.name)
    calls = 0

    def broken(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < fault.calls:
            return whole(*arguments, **options)
        note.write_text(str(time.time()))
        raise fault.error

    setattr(fault.owner, fault.name, broken)


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_is_heard_recorded_and_ends_the_job(small_run: SmallRun, name: str) -> None:
    fault = FAULTS[name]
    ending = failing_run(config_of(small_run, "run"), name)
    print(f"| {name} | {ending.statuses} | {ending.seconds:.1f} | {ending.messages[1].splitlines()[-1]} |")
    assert ending.seconds < LIMIT
    assert ending.statuses[1] == fault.status and ending.statuses[0] != 0
    said = "interrupted before a new checkpoint" if name == "Ctrl-C" else fault.told
    assert said in ending.messages[1].splitlines()[-1], ending.messages[1]
    assert ending.ends[1].kind is fault.kind and fault.told in ending.ends[1].message
    if name != "exception in a save":  # of which all ranks are told the reason as their own
        assert first_cause(ending.ends).rank == 1
        assert 0 not in ending.ends or ending.ends[0].kind is Kind.PEER, ending.ends[0]


def config_of(small_run: SmallRun, name: str) -> Config:
    return small_run.config(
        name,
        model={"d_model": 8, "n_layer": 1, "d_state": 2},
        train={"steps": 6, "global_batch": 4, "micro_batch": 2},
        data={"seq_len": 64},
        valid={"every": 3, "samples": 4},
        parallel={"strategy": "fsdp"},
    )
