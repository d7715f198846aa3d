"""What a rank holds under each ZeRO stage, by kind of tensor: a share of what is divided, and small buckets."""

import gc
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from caduceus.config import config_from_dict
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.train.optimizer import build_optimizer
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.slow

WORLD, LAYERS, LENGTH = 4, 8, 16
MOMENTS = ("forward", "backward", "between steps")
Held = dict[str, dict[str, float]]
"""By moment and kind: bytes held, in copies of the whole model's parameters in fp32."""


@pytest.fixture(scope="module")
def held() -> dict[int, list[Held]]:
    """By stage and rank."""
    stages = (1, 2, 3)
    by_rank = on_ranks(WORLD, weigh_stages, stages)
    return {stage: [of_rank[stage] for of_rank in by_rank] for stage in stages}


def weigh_stages(rank: int, stages: Iterable[int]) -> dict[int, Held]:
    return {stage: _weigh_a_training(rank, stage) for stage in stages}


def _weigh_a_training(rank: int, stage: int) -> Held:
    """Two steps, of which the second is weighed: DeepSpeed learns in the first in which order blocks come."""
    config = config_from_dict(
        {
            "model": {"d_model": 64, "n_layer": LAYERS, "rcps": True},
            "data": {"seq_len": LENGTH},
            "train": {"micro_batch": 1, "global_batch": WORLD},
            "parallel": {"strategy": "deepspeed", "zero_stage": stage},
        }
    )
    strategy = build_strategy(config, Ranks(rank, WORLD, 1, torch.device("cpu")), build_optimizer)
    model, held = strategy.model.module, {}
    whole = 4 * sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())

    def weigh(moment: str) -> Callable:
        def note(*_: object) -> None:
            held[moment] = {kind: count / whole for kind, count in _bytes_by_kind(strategy).items()}

        return note

    def watch_the_gradient(module: nn.Module, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        output[0].register_hook(weigh("backward"))

    tokens = torch.full((1, LENGTH), 7)
    for _ in range(2):
        hooks = [model.blocks[-1].register_forward_hook(weigh("forward"))]
        hooks.append(model.blocks[0].register_forward_hook(watch_the_gradient))
        with strategy.accumulating(True):
            strategy.backward(strategy.model(tokens, tokens, None, return_logits=False).loss_sum.sum() / LENGTH)
        strategy.clip(1.0)
        strategy.step(1e-3)
        for hook in hooks:
            hook.remove()
    weigh("between steps")()
    return held


def _bytes_by_kind(strategy: Strategy) -> dict[str, int]:
    """Bytes of tensors that the engine holds; gradients that lie in a bucket count as the bucket."""
    gc.collect()
    engine, parameters = strategy.optimizer, list(strategy.model.module.parameters())
    moments = [value for state in engine.optimizer.state.values() for value in state.values()]
    buckets = [bucket.buffer for bucket in engine.ipg_buckets.values()]
    divided = getattr(engine, "grad_partitions_flat_buffer", None)
    kinds = {
        "weights": [parameter.data for parameter in parameters],
        "parts of weights": [getattr(parameter, "ds_tensor", None) for parameter in parameters],
        "optimizer": [
            *getattr(engine, "fp32_partitioned_groups_flat", []),
            *getattr(engine, "single_partition_of_fp32_groups", []),
            *moments,
        ],
        "buckets": [part for buffer in buckets for part in (buffer if isinstance(buffer, list) else [buffer])],
        "gradients": [*(parameter.grad for parameter in parameters), divided],
    }
    seen, counts = set(), {}
    for kind, tensors in kinds.items():
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in seen}
        seen |= sizes.keys()
        counts[kind] = sum(sizes.values())
    return counts


@pytest.mark.parametrize(
    ("stage", "shares"),
    [
        # Master weights and both moments are divided in all stages.
        (1, {"weights": 1, "parts of weights": 0, "optimizer": 3 / WORLD, "gradients": 1}),
        (2, {"weights": 1, "parts of weights": 0, "optimizer": 3 / WORLD, "gradients": 2 / LAYERS + 1 / WORLD}),
        (3, {"weights": 3 / LAYERS, "parts of weights": 1 / WORLD, "optimizer": 3 / WORLD, "gradients": 2 / WORLD}),
    ],
)
def test_a_rank_never_holds_more_than_its_share_and_a_few_blocks(
    held: dict[int, list[Held]], stage: int, shares: dict[str, float]
) -> None:
    shares = {**shares, "buckets": 1 / LAYERS}
    for of_rank in held[stage]:
        for moment in MOMENTS:
            for kind, share in shares.items():
                # Parts are padded to equal sizes, and what is small stays whole.
                assert of_rank[moment][kind] <= 1.05 * share + 0.02, (moment, kind, of_rank[moment])


def test_between_steps_a_higher_stage_holds_less(held: dict[int, list[Held]]) -> None:
    totals = [max(sum(of_rank["between steps"].values()) for of_rank in held[stage]) for stage in (1, 2, 3)]
    assert totals[1] <= totals[0] and totals[2] < 0.85 * totals[1], totals
    assert max(of_rank["between steps"]["weights"] for of_rank in held[3]) < 0.05
