"""Acts as one rank of many in this process, without the others, in torch's fake process group, whose collectives do
nothing.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed.tensor import debug
from torch.testing._internal.distributed.fake_pg import FakeStore


@dataclass
class Made:
    """A group that a rank made: its ranks, its backend, and whether only its members waited for it."""

    ranks: list[int]
    backend: str | None
    timeout: timedelta | None
    alone: bool


@dataclass
class FakeWorld:
    """The groups that a rank asked torch.distributed for."""

    made: list[Made] = field(default_factory=list)


@contextlib.contextmanager
def fake_world(rank: int, world: int, timeout: timedelta = timedelta(minutes=25)) -> Iterator[FakeWorld]:
    """A context in which this process is `rank` of `world`; groups of every backend are fake."""
    seen, new_group = FakeWorld(), dist.new_group

    def noted(
        ranks: list[int] | None = None,
        timeout: timedelta | None = None,
        backend: str | None = None,
        use_local_synchronization: bool = False,
        **options: Any,
    ) -> dist.ProcessGroup:
        members = list(range(world)) if ranks is None else list(ranks)
        seen.made.append(Made(members, backend, timeout, use_local_synchronization))
        options["use_local_synchronization"] = use_local_synchronization
        return new_group(ranks, timeout, "fake", **options)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world, timeout=timeout)
    try:
        with mock.patch.object(dist, "new_group", noted):
            yield seen
    finally:
        dist.destroy_process_group()
        # DTensor's caches would give tensors of the next world groups of this one.
        for name in ("_clear_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
            getattr(debug, name, lambda: None)()
