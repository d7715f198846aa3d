"""What tests/test_odd_files.py has done behind tests/odd_files.c: python -m tests.odd_work shard|train PATHS."""

import os
import sys
from functools import partial
from pathlib import Path

from tests.odd_files import free_port, on_nodes


def shard(species: Path, out: Path) -> None:
    """Shard on two nodes: small species together, a large one in shares; and merge."""
    from data_prep.source.species_file import read_species_file
    from launch.shard_tasks import MergeTask, divided

    requests = read_species_file(species, {}, species.parent / "cache")
    for tasks in (*divided(requests, out, 1, 60_000), [MergeTask(tuple(requests), out, tuple(requests))]):
        on_nodes([("ab"[number % 2], task) for number, task in enumerate(tasks)])


def train(shards: Path, run: Path) -> None:
    """Two ranks on two nodes, to step 2 and again to step 4; then the table of runs."""
    from caduceus.files import write_atomically
    from caduceus.train import trainer
    from launch.listing import list_runs
    from tests.train.test_starts import config_of

    def rank(number: int, port: str, steps: int) -> None:
        places = {"RANK": number, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
        assert trainer.train(config_of(shards, run, steps)) == 0

    for steps in (2, 4):
        port = free_port()
        on_nodes([(node, partial(rank, number, port, steps)) for number, node in enumerate("ab")])
    on_nodes([("a", lambda: write_atomically(run.parent / "listed.txt", list_runs(run.parent).encode()))])


if __name__ == "__main__":
    {"shard": shard, "train": train}[sys.argv[1]](*map(Path, sys.argv[2:]))
