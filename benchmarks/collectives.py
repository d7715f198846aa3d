"""What ranks hold of a model, and the collectives of a step: counted on ranks, beside `caduceus.distributed.costs`.

    python benchmarks/collectives.py

The model is a Caduceus-PS in fp32 with two micro-batches a step; 16 ranks can divide each of its parameters. DDP and
FSDP are one rank of 16 in torch's fake process group, DeepSpeed is two real ranks over gloo. Exchanges of 400 bytes or
fewer, with which ranks agree, are left out. ZeRO 1 and 2 gather the parameters with weight decay and the others
separately; the formula takes them together. ZeRO 3 keeps small parameters gathered, and the last block between its
passes, so the formula is an upper bound there.
"""

import datetime
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
from machine import processor
from torch.distributed.tensor import Shard

from caduceus.config import Config
from caduceus.distributed import fsdp
from caduceus.distributed.costs import exchanges
from caduceus.distributed.fake import fake_world
from caduceus.distributed.held import Held, held
from tests.distributed.ranks import on_ranks
from tests.distributed.recorder import Call
from tests.distributed.test_costs import AGREED, KEYS, config_of, costs_of

WORLD, ZERO_WORLD, PASSES = 16, 2, 2
KINDS = ("all-reduce", "all-gather", "reduce-scatter")
SHARDED = {"FSDP": {"strategy": "fsdp"}, "hybrid, 2 share": {"strategy": "fsdp", "shard": 2}}


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{datetime.date.today()} · {processor()}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print("KiB of parameters, gradients, optimizer state on the rank of four that holds most, and by formula:\n")
    print("| layout | along the first axis, as before | along the largest that divides | by formula |")
    print("|---|---|---|---|")
    for name, parallel in SHARDED.items():
        config = config_of(parallel, 4, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fsdp, "shard_axis", lambda parameter, holders: Shard(0))
            before = most_held(config)
        print(f"| {name} | {kib(before)} | {kib(most_held(config))} | {kib(held(config, 4))} |")
    print("\nCollectives of a step: how many, and the bytes that a rank gives to all of them:\n")
    print(f"| layout | ranks | | {' | '.join(KINDS)} |")
    print("|---|---|---|---|---|---|")
    for name, parallel in KEYS.items():
        config = config_of(parallel, WORLD, PASSES)
        with fake_world(0, WORLD):
            _, calls = costs_of(config, 0, WORLD)
        show(name, WORLD, calls, config)
    zero = [config_of({"strategy": "deepspeed", "zero_stage": stage}, ZERO_WORLD, PASSES) for stage in range(4)]
    for stage, calls in enumerate(on_ranks(ZERO_WORLD, zero_calls, zero)[0]):
        show(f"ZeRO {stage}", ZERO_WORLD, calls, zero[stage])


def zero_calls(rank: int, configs: list[Config]) -> list[list[Call]]:
    return [costs_of(config, rank, ZERO_WORLD)[1] for config in configs]


def most_held(config: Config) -> Held:
    found = []
    for rank in range(4):
        with fake_world(rank, 4):
            found.append(costs_of(config, rank, 4)[0])
    return max(found, key=lambda one: one.total)


def kib(held: Held) -> str:
    return " + ".join(f"{count / 2**10:.0f}" for count in (held.parameters, held.gradients, held.states))


def show(name: str, world: int, calls: list[Call], config: Config) -> None:
    counted = [(call.kind, call.bytes, 1) for call in calls]
    foretold = [(one.kind, one.bytes, one.times) for one in exchanges(config, world)]
    for row, found in (("counted", counted), ("by formula", foretold)):
        times: Counter[str] = Counter()
        sums: Counter[str] = Counter()
        for kind, size, number in found:
            if size > AGREED:
                times[kind] += number
                sums[kind] += number * size
        cells = [f"{times[kind]} x, {sums[kind]:,}" if times[kind] else "" for kind in KINDS]
        first = f"{name} | {world}" if row == "counted" else " | "
        print(f"| {first} | {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
