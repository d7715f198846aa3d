"""Runs a function on several real processes joined by gloo."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on `world` processes; what each returned, by rank."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_join_and_run, (world, directory, function, arguments), nprocs=world)
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _join_and_run(rank: int, world: int, directory: str, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    torch.save(function(rank, *arguments), Path(directory) / f"{rank}.pt")
    dist.destroy_process_group()
