"""What ranks hold of parameters, gradients and optimizer state where these are sharded, and what they gather."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from caduceus.config import Config, config_from_dict
from caduceus.distributed import fsdp
from caduceus.distributed.build import build_model, build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.train.optimizer import build_optimizer
from tests.distributed.ranks import on_ranks

CPU = torch.device("cpu")


def config_of(shard: int = 0, d_model: int = 64, **parallel: Any) -> Config:
    return config_from_dict(
        {
            "model": {"d_model": d_model, "n_layer": 2, "rcps": True},
            "parallel": {"strategy": "fsdp", "shard": shard, **parallel},
        }
    )


def take_a_step(strategy: Strategy) -> dict[str, int]:
    """Elements that this rank holds of parameters, gradients and optimizer state in the update."""
    ids = torch.full((1, 32), 8)
    strategy.backward(strategy.model(ids, ids).loss)
    strategy.clip(1.0)
    parameters = list(strategy.model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    strategy.optimizer.step()
    states = [tensor for state in strategy.optimizer.state.values() for tensor in state.values() if tensor.dim()]
    return {"parameters": held(parameters), "gradients": held(gradients), "states": held(states)}


def held(tensors: list[Tensor]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in tensors)


def shares(rank: int, configs: list[Config]) -> list[tuple[dict[str, int], set[int]]]:
    """Per configuration, what a step holds, and how many elements its gathers make."""
    found = []
    for config in configs:
        gathered: set[int] = set()
        with pytest.MonkeyPatch.context() as patch:
            for name in {"all_gather_into_tensor", "all_gather_single"} & set(vars(dist)):  # by the release of torch
                patch.setattr(dist, name, counting(getattr(dist, name), gathered))
            strategy = build_strategy(config, Ranks(rank, dist.get_world_size(), 1, CPU), build_optimizer)
            found.append((take_a_step(strategy), gathered))
    return found


def counting(gather: Callable[..., Any], gathered: set[int]) -> Callable[..., Any]:
    def counted(output: Tensor, *arguments: Any, **options: Any) -> Any:
        gathered.add(output.numel())
        return gather(output, *arguments, **options)

    return counted


@pytest.mark.slow
def test_ranks_hold_their_share_of_all_and_gather_nothing_else() -> None:
    by_rank = on_ranks(4, shares, [config_of(), config_of(shard=2), config_of(cpu_offload=True)])
    model = build_model(config_of())
    whole = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    rest = whole - block * len(model.blocks)
    for found in by_rank:
        for (counts, gathered), holders in zip(found, (4, 2, 4), strict=True):
            share = whole / holders
            assert counts == {"parameters": share, "gradients": share, "states": 2 * share}
            assert gathered == {block, rest}, "no padding travels"


def reload(rank: int, directory: Path) -> bool:
    """Save as earlier releases sharded, along the first axis, and load into today's layout."""
    ranks = Ranks(rank, dist.get_world_size(), 1, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "shard_axis", lambda parameter, holders: Shard(0))
        before = build_strategy(config_of(), ranks, build_optimizer)
    take_a_step(before)
    before.save(directory, None)
    after = build_strategy(config_of(), ranks, build_optimizer)
    after.load(directory)
    return all(
        torch.equal(old.full_tensor(), new.full_tensor())
        for old, new in zip(tensors_of(before), tensors_of(after), strict=True)
    )


def tensors_of(strategy: Strategy) -> list[DTensor]:
    states = [strategy.optimizer.state[parameter] for parameter in strategy.model.parameters()]
    return [*strategy.model.parameters(), *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))]


@pytest.mark.slow
def test_checkpoints_that_were_sharded_along_the_first_axis_load(tmp_path: Path) -> None:
    assert on_ranks(2, reload, tmp_path) == [True, True]


@given(st.lists(st.integers(1, 24), min_size=1, max_size=3), st.integers(1, 8))
def test_the_axis_is_the_largest_that_divides_evenly(shape: list[int], holders: int) -> None:
    axis = fsdp.shard_axis(torch.empty(shape), holders).dim
    if any(size % holders == 0 for size in shape):
        assert shape[axis] == max(size for size in shape if size % holders == 0)
    else:
        assert axis == 0


@pytest.mark.slow
def test_the_largest_share_is_what_a_rank_holds() -> None:
    """With three ranks, which nothing of this model divides."""
    [(counts, _)], *_ = on_ranks(3, shares, [config_of(d_model=32)])
    model = build_model(config_of(d_model=32))
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert counts["parameters"] == round(fsdp.largest_share(model, 3) * whole)


@pytest.mark.moderate
def test_an_uneven_share_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp, "sharding_mesh", lambda ranks, shard: None)
    monkeypatch.setattr(fsdp, "fully_shard", lambda part, **options: part)
    ranks = Ranks(0, 1, 1, CPU)
    for world, told in ((2, False), (4, False), (3, True)):
        caplog.clear()
        ranks.world = world
        strategy = object.__new__(fsdp.FSDP)
        strategy.ranks = ranks
        strategy.wrap(config_of(), build_model(config_of()))
        assert len([record for record in caplog.records if "cannot share this model evenly" in record.message]) == told
