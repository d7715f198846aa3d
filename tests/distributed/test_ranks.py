import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.testing._internal.distributed.fake_pg import FakeStore

from caduceus.config import Config
from caduceus.distributed import groups
from caduceus.distributed.fake import fake_world
from caduceus.distributed.fsdp import sharding_mesh
from caduceus.distributed.ranks import PATIENCE, Ranks, is_lost_contact
from caduceus.distributed.rendezvous import COLLECTIVE_MARGIN, NO_TIMEOUT, joined
from tests.distributed.fake import CPU
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
    of_training = timedelta(minutes=60) + COLLECTIVE_MARGIN
    for timeouts, descriptors in on_ranks(4, timeouts_of_groups, config):
        assert timeouts == [of_training] * 4 + [PATIENCE]
        assert descriptors == 4 + 3, "of a group of gloo, for each of its ranks and three more"


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


def timeouts_of_groups(rank: int, config: Config) -> tuple[list[timedelta], int]:
    """The time-outs of the groups of training and of slow work; and the descriptors that one more group takes."""
    with joined(config) as ranks:
        shared = [ranks.context_group.group, ranks.strand_group.group]
        found = [*shared, *sharding_mesh(ranks, config.parallel.shard).get_all_groups(), ranks._patient_group]
        before = open_descriptors()
        dist.new_group(backend="gloo")
        after = open_descriptors()
        dist.barrier()
        return [timeout_of(group) for group in found], after - before


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("strands", "context", "axes"), [(1, 8, [8, 8]), (2, 4, [4, 2, 8]), (2, 1, [2, 2]), (1, 1, [])]
)
def test_512_ranks_make_their_groups_in_as_many_turns_as_axes(strands: int, context: int, axes: list[int]) -> None:
    """One after another they would take 64 splits of NCCL for context 8, and 256 for 2 strands of context 4."""
    covered = [set() for _ in axes]
    for rank in range(512):
        with fake_world(rank, 512) as seen:
            Ranks(rank, 512, context, CPU, timedelta(minutes=25), strands)
        *made, patient = seen.made
        assert [len(group.ranks) for group in made] == axes
        assert all(group.alone and rank in group.ranks for group in made)
        assert (len(patient.ranks), patient.backend, patient.timeout) == (512, "gloo", PATIENCE)
        for found, group in zip(covered, made, strict=True):
            found.add(tuple(group.ranks))
    for found in covered:
        assert sorted(rank for group in found for rank in group) == list(range(512)), "each in one, as NCCL splits"


def test_groups_that_compute_are_of_nccl_and_that_of_readers_of_gloo() -> None:
    with fake_world(0, 4) as seen:
        Ranks(0, 4, 2, torch.device("cuda", 0), None, 2)
    assert [group.backend for group in seen.made] == ["nccl", "nccl", "gloo", "gloo"]


def test_slow_work_is_agreed_on_over_the_patient_group_and_no_copy_is_made_per_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fake_world(3, 512):
        ranks, asked = Ranks(3, 512, 1, CPU), []
        for owner, name in ((dist, "all_reduce"), (groups, "_ALL_GATHER"), (dist, "all_gather"), (dist, "barrier")):
            monkeypatch.setattr(owner, name, noting(asked, name, getattr(owner, name)))
        for patient in (None, ranks._patient_group):
            asked.clear()
            with contextlib.nullcontext() if patient is None else ranks.patiently():
                ranks.maximum(0)
                assert ranks.gather([1.0, 2.0]).shape == (512, 2)
                ranks.barrier()
            assert asked == [("all_reduce", patient), ("_ALL_GATHER", patient), ("barrier", patient)]


@pytest.mark.slow
def test_slow_work_of_one_rank_outlasts_the_time_out_of_training() -> None:
    assert on_ranks(2, wait_for_a_slow_rank) == [("all came", True)] * 2


def wait_for_a_slow_rank(rank: int) -> tuple[str, bool]:
    """What came over the group for slow work, and whether that of training gives up."""
    ranks = Ranks(rank, 2, 1, CPU)
    _set_pg_timeout(timedelta(seconds=0.5), dist.group.WORLD)
    with ranks.patiently(), ranks.agreeing():
        time.sleep(1.5 * rank)
    with ranks.patiently():
        time.sleep(1.5 * rank)
        told = ranks.broadcast("all came") if ranks.gather_objects(rank) == [0, 1] else "some"
    try:
        time.sleep(1.5 * rank)
        ranks.barrier()
    except RuntimeError as error:
        return told, is_lost_contact(error)
    finally:  # as the suite's own ranks end with it
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    return told, False


def noting(asked: list, name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append((name, options.get("group")))
        return whole(*arguments, **options)

    return noted


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout
