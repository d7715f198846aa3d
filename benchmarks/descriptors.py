"""Open files that a rank takes for its groups: counted on ranks of this machine, and computed for hundreds of ranks.

    python benchmarks/descriptors.py [--ranks 4 8]

It counts the groups that a training makes of all ranks besides the first one: for slow work, and for the ranks that
write a checkpoint (FSDP over all ranks). It counts after all ranks have exchanged something in each group. "Lazily" is
with TORCH_GLOO_LAZY_INIT=1, which a rank sets if it may not raise its limit.
"""

import argparse
import datetime
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from machine import processor

from caduceus.distributed.environment import descriptors
from caduceus.distributed.groups import group_of
from caduceus.distributed.ranks import PATIENCE, Ranks
from tests.distributed.ranks import on_ranks

GROUPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{datetime.date.today()} · {processor()}, torch {torch.__version__}\n")
    print("| ranks | counted for the two further groups | by formula | lazily | a rank needs in all, at most |")
    print("|---|---|---|---|---|")
    for world in options.ranks:
        os.environ.pop("TORCH_GLOO_LAZY_INIT", None)
        eager = max(on_ranks(world, taken))
        os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
        lazy = max(on_ranks(world, taken))
        print(f"| {world} | {eager} | {GROUPS * (world + 3)} | {lazy} | {descriptors(world):,} |", flush=True)
    for world in (64, 512, 2048):
        print(f"| {world} | - | {GROUPS * (world + 3):,} | - | {descriptors(world):,} |")


def taken(rank: int) -> int:
    """Open files that the groups besides the first take on this rank, after an all-reduce in each."""
    world = dist.get_world_size()
    before = open_files()
    ranks = Ranks(rank, world, 1, torch.device("cpu"))
    writers = group_of(list(range(world)), PATIENCE, "gloo")
    with ranks.patiently():
        ranks.maximum(0)
    dist.all_reduce(torch.zeros(1), group=writers)
    dist.barrier()
    return open_files() - before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


if __name__ == "__main__":
    main()
