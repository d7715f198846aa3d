"""What ranks exchange in a step, in which order and over whom: one rank of 512 at a time."""

import itertools
from typing import Any

import pytest
import torch

from caduceus.config import config_from_dict
from caduceus.distributed.build import build_strategy
from caduceus.distributed.fake import fake_world
from caduceus.distributed.ranks import Ranks
from caduceus.train.optimizer import build_optimizer
from tests.distributed.fake import CPU, meet_by_python
from tests.distributed.recorder import Call, Recorder

WORLD, LAYERS = 512, 2
KEYS = {
    "ddp": {"strategy": "ddp"},
    "hybrid": {"strategy": "fsdp", "shard": 8},
    "fsdp": {"strategy": "fsdp"},
    "context": {"strategy": "ddp", "context": 8},
    "strands": {"strategy": "ddp", "strands": 2},
    "hybrid, all shared": {"strategy": "fsdp", "shard": 8, "strands": 2, "context": 4},
}


def calls_of(rank: int, parallel: dict[str, Any]) -> list[Call]:
    """The collectives of one step of a rank of 512."""
    with fake_world(rank, WORLD):
        ranks = Ranks(rank, WORLD, parallel.get("context", 1), CPU, None, parallel.get("strands", 1))
        model = {"d_model": 512, "d_state": 2, "expand": 1, "n_layer": LAYERS, "rcps": True}
        strategy = build_strategy(config_from_dict({"model": model, "parallel": parallel}), ranks, build_optimizer)
        meet_by_python(strategy)
        ids = torch.full((1, 16), 8)
        with Recorder() as recorder:
            strategy.backward(strategy.model(ids, ids, None, return_logits=False).loss_sum.sum())
            strategy.clip(1.0)
            strategy.step(1e-3)
    return recorder.calls


@pytest.mark.moderate
@pytest.mark.parametrize("name", KEYS)
def test_ranks_of_a_group_agree_in_what_they_exchange_and_when(name: str) -> None:
    """Else they would wait for each other without end. First and last ranks of nodes and of samples."""
    by_rank = {rank: calls_of(rank, KEYS[name]) for rank in (0, 1, 8, 511)}
    assert all(by_rank.values())
    for one, other in itertools.combinations(by_rank, 2):
        first, second = ([call for call in by_rank[rank] if {one, other} <= set(call.ranks)] for rank in (one, other))
        assert first == second, (one, other)


@pytest.mark.moderate
def test_copies_of_hybrid_sharding_clip_by_the_same_bits() -> None:
    calls = calls_of(9, KEYS["hybrid"])
    norm, told = calls[-2:]
    assert (norm.kind, norm.ranks) == ("all-reduce", tuple(range(8, 16)))
    assert told == Call("broadcast", tuple(range(1, WORLD, 8)), 4)
