"""What a layout is said to cost is what ranks are counted holding and sending."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from caduceus.config import Config, config_from_dict
from caduceus.distributed.build import build_strategy
from caduceus.distributed.costs import Group, Sent, exchanges, micro_batches_per_step, sent
from caduceus.distributed.fake import fake_world
from caduceus.distributed.held import Held, held
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.train.optimizer import build_optimizer
from tests.distributed.fake import CPU, meet_by_python
from tests.distributed.ranks import on_ranks
from tests.distributed.recorder import Call, Recorder

LENGTH = 32
AGREED = 400
"""Bytes of the few numbers on which ranks agree in a step: a norm of each parameter."""
KEYS = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "hybrid": {"strategy": "fsdp", "shard": 8},
    "ddp, context 8": {"strategy": "ddp", "context": 8},
    "ddp, strands 2": {"strategy": "ddp", "strands": 2},
    "hybrid, strands 2 x context 4": {"strategy": "fsdp", "shard": 8, "strands": 2, "context": 4},
}


def config_of(parallel: dict[str, Any], world: int, accumulation: int) -> Config:
    sequences = world // (parallel.get("context", 1) * parallel.get("strands", 1))
    return config_from_dict(
        {
            "model": {"d_model": 64, "d_state": 4, "n_layer": 3, "rcps": True},
            "data": {"seq_len": LENGTH, "mask_prob": 1.0},
            "train": {"micro_batch": 2, "global_batch": 2 * sequences * accumulation, "precision": "fp32"},
            "parallel": parallel,
        }
    )


def costs_of(config: Config, rank: int, world: int) -> tuple[Held, list[Call]]:
    """Counted in the third step: in the first two DeepSpeed learns in which order blocks come, and compares it."""
    parallel = config.parallel
    ranks = Ranks(rank, world, parallel.context or 1, CPU, None, parallel.strands or 1)
    strategy = build_strategy(config, ranks, build_optimizer)
    if parallel.strategy == "ddp" and torch.distributed.get_backend() == "fake":
        meet_by_python(strategy)
    ids = torch.full((config.train.micro_batch, LENGTH // ranks.context), 8)
    for _ in range(3):
        with Recorder() as recorder:
            passes = micro_batches_per_step(config, world)
            for number in range(passes):
                with strategy.accumulating(number == passes - 1):
                    strategy.backward(strategy.model(ids, ids, None, return_logits=False).loss_sum.sum())
            strategy.clip(1.0)
            found = held_by(strategy) if parallel.strategy != "deepspeed" else Held(0, 0, 0)
            strategy.step(1e-3)
    assert {call.kind for call in recorder.calls} <= {"all-reduce", "all-gather", "reduce-scatter", "broadcast"}
    return found, recorder.calls


def sum_of(calls: list[Call]) -> Sent:
    kinds = ("all-reduce", "all-gather", "reduce-scatter")
    return Sent(*(sum(call.bytes for call in calls if call.kind == kind) for kind in kinds))


def held_by(strategy: Strategy) -> Held:
    parameters = list(strategy.model.parameters())
    states = [tensor for state in strategy.optimizer.state.values() for tensor in state.values() if tensor.dim()]
    return Held(nbytes(parameters), nbytes([parameter.grad for parameter in parameters]), nbytes(states))


def nbytes(tensors: list[Tensor]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


@pytest.mark.moderate
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", KEYS)
def test_a_rank_holds_and_sends_what_the_formula_says(name: str, accumulation: int) -> None:
    """There are 16 ranks, one at a time in this process; every parameter divides by 16, so that nothing is padded."""
    config = config_of(KEYS[name], 16, accumulation)
    for rank in (0, 9):
        with fake_world(rank, 16):
            holds, calls = costs_of(config, rank, 16)
        assert holds == held(config, 16)
        sends, expected = sum_of(calls), sent(config, 16)
        assert 0 <= sends.all_reduce - expected.all_reduce <= AGREED
        assert (sends.all_gather, sends.reduce_scatter) == (expected.all_gather, expected.reduce_scatter)
        found = Counter((call.kind, len(call.ranks), call.bytes) for call in calls if call.bytes > AGREED)
        foretold: Counter[tuple[str, int, int]] = Counter()
        for one in exchanges(config, 16):
            if one.bytes > AGREED and not (one.what == "gradients" and name.startswith("ddp")):  # which fill buckets
                foretold[one.kind, one.group.size, one.bytes] += one.times
                assert Group("", one.group.size, one.group.stride) in {
                    Group("", len(call.ranks), call.ranks[1] - call.ranks[0]) for call in calls
                }
        buckets = {key for key in found if name.startswith("ddp") and key[:2] == ("all-reduce", 16)}
        assert {key: times for key, times in found.items() if key not in buckets} == foretold


ZERO = [config_of({"strategy": "deepspeed", "zero_stage": stage}, 2, passes) for stage in range(4) for passes in (1, 2)]


def zero_costs(rank: int) -> list[list[Call]]:
    return [costs_of(config, rank, 2)[1] for config in ZERO]


@pytest.mark.slow
def test_zero_sends_what_the_formula_says() -> None:
    for of_rank in on_ranks(2, zero_costs):
        for config, calls in zip(ZERO, of_rank, strict=True):
            sends, expected, stage = sum_of(calls), sent(config, 2), config.parallel.zero_stage
            assert 0 <= sends.all_reduce - expected.all_reduce <= AGREED, stage
            assert sends.reduce_scatter == expected.reduce_scatter, stage
            assert sends.all_gather <= expected.all_gather and (stage == 3 or sends.all_gather == expected.all_gather)
            found = Counter(call.kind for call in calls if call.bytes > AGREED)
            foretold: Counter[str] = Counter()
            for one in exchanges(config, 2):
                foretold[one.kind] += one.times * (one.bytes > AGREED)
            if stage in (1, 2):  # gather the parameters that decay, and then the others
                found["all-gather"] -= 1
            if stage == 3:
                assert found.pop("all-gather") <= foretold.pop("all-gather")
            assert +found == +foretold, stage
