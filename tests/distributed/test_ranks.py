from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from caduceus.config import Config
from caduceus.distributed.fsdp import sharding_mesh
from caduceus.distributed.rendezvous import COLLECTIVE_MARGIN, NO_TIMEOUT, joined
from tests.distributed.layouts import Layout, config_of
from tests.distributed.ranks import on_ranks


@pytest.mark.parametrize(
    ("minutes", "timeout"), [(2, timedelta(minutes=2) + COLLECTIVE_MARGIN), (0, NO_TIMEOUT), (1e300, NO_TIMEOUT)]
)
def test_a_collective_may_take_longer_than_a_step(tmp_path: Path, minutes: float, timeout: timedelta) -> None:
    config = config_of(Layout("", 1, {"strategy": "ddp"}), tmp_path, tmp_path / "run", stall_minutes=minutes)
    with joined(config):
        assert timeout_of(dist.group.WORLD) == timeout


@pytest.mark.slow
def test_so_may_one_of_some_of_the_ranks(tmp_path: Path) -> None:
    layout = Layout("", 4, {"strategy": "fsdp", "context": 2, "strands": 2, "shard": 2})
    config = config_of(layout, tmp_path, tmp_path / "run", stall_minutes=60)
    assert on_ranks(4, timeouts_of_groups, config) == [[timedelta(minutes=60) + COLLECTIVE_MARGIN] * 4] * 4


@pytest.mark.slow
def test_ranks_that_would_have_no_part_of_a_batch_share_its_sequences(tmp_path: Path) -> None:
    layout = Layout("", 4, {"strategy": "ddp", "strands": 2, "context": 2})
    given = config_of(layout, tmp_path, tmp_path / "run")
    given.train.global_batch = given.train.micro_batch = 1
    left_out = config_of(layout, tmp_path, tmp_path / "run")
    left_out.train.global_batch = left_out.train.micro_batch = 1
    left_out.parallel.strands = left_out.parallel.context = 0
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert on_ranks(4, places_of, [given, left_out]) == [[place, place] for place in places]


def places_of(rank: int, configs: list[Config]) -> list[tuple[int, int, int]]:
    found = []
    for config in configs:
        with joined(config) as ranks:
            found.append((ranks.data_rank, ranks.strand_rank, ranks.context_rank))
    return found


def timeouts_of_groups(rank: int, config: Config) -> list[timedelta]:
    with joined(config) as ranks:
        shared = [ranks.context_group.group, ranks.strand_group.group]
        groups = [*shared, *sharding_mesh(ranks, config.parallel.shard).get_all_groups()]
        return [timeout_of(group) for group in groups]


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout
