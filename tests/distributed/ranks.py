"""Runs a function on several real processes joined by gloo.

They are forked from a process that has imported what they need, which takes longer than a small training.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import preloaded

_REPOSITORY = Path(__file__).resolve().parents[2]
_IMPORTED = "tests.distributed.imported"


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on `world` processes; what each returned, by rank."""
    start_server()
    with tempfile.TemporaryDirectory() as directory:
        given = world, directory, dict(os.environ), function, arguments
        mp.start_processes(_join_and_run, given, nprocs=world, start_method="forkserver")
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def start_server() -> None:
    """The process to fork from, one for all tests of this process."""
    multiprocessing.set_forkserver_preload([_IMPORTED])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(_REPOSITORY), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()


def start_ranks(commands: Sequence[Sequence[Any]], **options: Any) -> list[subprocess.Popen]:
    """Start the command of each rank, which meet on this machine; `options` are those of subprocess.Popen."""
    place = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | place
    return [
        preloaded.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, **options)
        for rank, command in enumerate(commands)
    ]


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _join_and_run(
    rank: int, world: int, directory: str, environment: dict[str, str], function: Callable[..., Any], arguments: tuple
) -> None:
    gc.freeze()  # DeepSpeed collects garbage at every start: not among all that was imported
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    torch.save(function(rank, *arguments), Path(directory) / f"{rank}.pt")
    dist.barrier()  # one that leaves early would disturb others that are still connecting
    dist.destroy_process_group()
