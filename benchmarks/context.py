"""Forward and backward pass of one sequence, whole and shared by ranks, by slices and by strands: time, and bytes sent.

    python benchmarks/context.py [--seq-len 65536] [--d-model 64] [--n-layer 2] [--ranks 1 2 4] [--repeats 5]

Every rank computes on one thread, so as many ranks as there are cores can be faster than one. The best of the repeats
counts, by the slowest rank. A rank passes over its slice once more in each direction, to find the state and the adjoint
that it passes on.

Bytes are what a rank puts into collectives in one pass, counted where they are called. By the formula, a layer of
Caduceus-PS takes 4 runs (two streams in two directions) of 4 bytes each for B · E · (N + 1) numbers of the scan and B ·
E · (K - 1) of the convolution. The backward pass takes B · E · N, and for each of the R ranks B · E · (K - 1).

In the last row of the table two ranks have one strand each of the whole sequence (`parallel.strands`), instead of both
strands of half of it. They exchange the logits of the labelled bases, 16 numbers each, and nothing in the backward
pass.
"""

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import torch.distributed as dist
from machine import processor
from torch.utils._python_dispatch import TorchDispatchMode

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.allocator import keep_freed_memory
from caduceus.alphabet import IGNORE_LABEL
from caduceus.distributed import groups
from caduceus.distributed.context import ContextGroup
from caduceus.distributed.fake import fake_world
from caduceus.distributed.strands import StrandGroup
from tests.distributed.ranks import on_ranks

RUNS = 4
"""Directions times streams in which a layer of Caduceus-PS scans and convolves: two and two."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--n-layer", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    config = CaduceusConfig(d_model=options.d_model, n_layer=options.n_layer, rcps=True)
    print(f"{datetime.date.today()} · {processor()}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(f"Caduceus-PS, d_model {options.d_model}, {options.n_layer} layers, 1 x {options.seq_len:,} bases, fp32\n")
    print(
        "| ranks | s | times faster | processor s | times less | KB forward, counted | by formula | KB backward, "
        "counted | by formula |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    alone = None
    for ranks in options.ranks:
        results = on_ranks(ranks, measure, config, options.seq_len, options.repeats)
        seconds, spent, forward, backward = map(max, zip(*results, strict=True))
        alone = alone or (seconds, spent)
        expected = by_formula(config, ranks) if ranks > 1 else (0, 0)
        kilobytes = [forward, expected[0], backward, expected[1]]
        cells = " | ".join(f"{count / 1e3:,.1f}" for count in kilobytes)
        print(f"| {ranks} | {times(seconds, spent, alone)} | {cells} |", flush=True)
    of_strands = on_ranks(2, measure_strand, config, options.seq_len, options.repeats)
    seconds, spent, forward, backward = map(max, zip(*of_strands, strict=True))
    expected = 4 * config.padded_vocab_size * int(batch(options.seq_len)[1].ne(IGNORE_LABEL).sum())
    cells = f"{forward / 1e3:,.1f} | {expected / 1e3:,.1f} | {backward / 1e3:,.1f} | 0.0"
    print(f"| 2, a strand each | {times(seconds, spent, alone)} | {cells} |")
    print(f"\nOperators of a micro-batch: {operators(1):,} alone, {operators(8):,} as one of 8 ranks.")


def times(seconds: float, spent: float, alone: tuple[float, float]) -> str:
    return f"{seconds:.2f} | {alone[0] / seconds:.2f} | {spent:.2f} | {alone[1] / spent:.2f}"


class Operators(TorchDispatchMode):
    """Counts those that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def operators(ranks: int) -> int:
    """Of a forward and backward pass of 16 layers, in the second of two: the first makes what all share."""
    model = CaduceusForMaskedLM(CaduceusConfig(d_model=8, n_layer=16, rcps=True))
    input_ids, labels = batch(64)
    with fake_world(ranks // 2, max(ranks, 2)):
        if ranks > 1:
            model.share_sequences(ContextGroup(dist.group.WORLD, ranks // 2, ranks))
        for _ in range(2):
            with Operators() as counted:
                model(input_ids, labels, return_logits=False).loss_sum.sum().backward()
    return counted.count


def by_formula(config: CaduceusConfig, ranks: int) -> tuple[int, int]:
    """Bytes that a rank gives to collectives in a forward and in a backward pass."""
    numbers = 4 * RUNS * config.n_layer * config.d_inner
    states, halo = config.d_state, config.d_conv - 1
    return numbers * (states + 1 + halo), numbers * (states + ranks * halo)


def measure(rank: int, config: CaduceusConfig, seq_len: int, repeats: int) -> tuple[float, float, int, int]:
    """Best seconds and processor seconds of a pass, and the bytes given to collectives forward and backward."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(config)
    if ranks > 1:
        model.share_sequences(ContextGroup(dist.group.WORLD, rank, ranks))
    return timed(model, seq_len // ranks, repeats)


def measure_strand(rank: int, config: CaduceusConfig, seq_len: int, repeats: int) -> tuple[float, float, int, int]:
    """The same for a rank that has one strand of the whole sequence."""
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(config, strands=StrandGroup(dist.group.WORLD, rank, 2))
    return timed(model, seq_len, repeats)


def batch(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bases and labels (1, L), the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(7, 11, (1, length), generator=generator)
    labelled = torch.rand(input_ids.shape, generator=generator) < 0.15
    return input_ids, torch.where(labelled, input_ids, IGNORE_LABEL)


def timed(model: CaduceusForMaskedLM, length: int, repeats: int) -> tuple[float, float, int, int]:
    keep_freed_memory()
    input_ids, labels = batch(length)

    def forward() -> torch.Tensor:
        return model(input_ids, labels, return_logits=False).loss_sum.sum()

    losses: list[torch.Tensor] = []
    bytes_forward = count_bytes(lambda: losses.append(forward()))
    bytes_backward = count_bytes(lambda: losses.pop().backward())
    best = least = float("inf")
    for _ in range(repeats):
        dist.barrier()
        started, spent = time.perf_counter(), time.process_time()
        forward().backward()
        best, least = min(best, time.perf_counter() - started), min(least, time.process_time() - spent)
    return best, least, bytes_forward, bytes_backward


def count_bytes(run: Callable[[], None]) -> int:
    """What this rank gives to the collectives of `ContextGroup` and `StrandGroup` in `run`."""
    given = 0

    def counted(collective: Callable[..., object], position: int) -> Callable[..., object]:
        def call(*tensors: torch.Tensor, **options: object) -> object:
            nonlocal given
            given += tensors[position].nbytes
            return collective(*tensors, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_ALL_GATHER", counted(groups._ALL_GATHER, 1))
        patch.setattr(groups, "_REDUCE_SCATTER", counted(groups._REDUCE_SCATTER, 1))
        patch.setattr(dist, "all_reduce", counted(dist.all_reduce, 0))
        run()
    return given


if __name__ == "__main__":
    main()
