"""Forward and backward pass of one sequence, whole and shared by the ranks of a context group: time, and bytes sent.

    python benchmarks/context.py [--seq-len 65536] [--d-model 64] [--n-layer 2] [--ranks 1 2 4] [--repeats 5]

Every rank computes on one thread, so as many ranks as there are cores can be faster than one; the best of the repeats
counts, by the slowest rank. A rank passes over its slice once more each way, for the state and the adjoint to pass on.

Bytes are what a rank puts into collectives in one pass, counted where they are called. By the formula, a layer of
Caduceus-PS takes 4 runs (two streams in two directions) of 4 bytes each for B · E · (N + 1) numbers of the scan and
B · E · (K - 1) of the convolution; on the way back B · E · N, and for each of the R ranks B · E · (K - 1).

The last row is what two ranks would reach if each had one strand of the whole sequence instead of both strands of half
of it: strands meet only in the loss, whose exchange is left out.
"""

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from machine import processor

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.allocator import keep_freed_memory
from caduceus.alphabet import IGNORE_LABEL
from caduceus.distributed.context import ContextGroup
from tests.distributed.ranks import on_ranks

RUNS = 4
"""Of scan and convolution in a layer of Caduceus-PS: two streams in two directions."""


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
    print("| ranks | s | times faster | KB forward, counted | by formula | KB backward, counted | by formula |")
    print("|---|---|---|---|---|---|---|")
    alone = None
    for ranks in options.ranks:
        results = on_ranks(ranks, measure, config, options.seq_len, options.repeats)
        seconds, forward, backward = max(results)
        alone = alone or seconds
        expected = by_formula(config, ranks) if ranks > 1 else (0, 0)
        kilobytes = [forward, expected[0], backward, expected[1]]
        cells = " | ".join(f"{count / 1e3:,.1f}" for count in kilobytes)
        print(f"| {ranks} | {seconds:.2f} | {alone / seconds:.2f} | {cells} |", flush=True)
    seconds = max(on_ranks(2, measure_strand, config, options.seq_len, options.repeats))[0]
    print(f"| 2, a strand each | {seconds:.2f} | {alone / seconds:.2f} | | | | |")


def by_formula(config: CaduceusConfig, ranks: int) -> tuple[int, int]:
    """Bytes that a rank gives to collectives in a forward and in a backward pass."""
    numbers = 4 * RUNS * config.n_layer * config.d_inner
    states, halo = config.d_state, config.d_conv - 1
    return numbers * (states + 1 + halo), numbers * (states + ranks * halo)


def measure(rank: int, config: CaduceusConfig, seq_len: int, repeats: int) -> tuple[float, int, int]:
    """Best seconds of a pass on this rank, and the bytes that it gives to collectives forward and backward."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(config)
    if ranks > 1:
        model.share_sequences(ContextGroup(dist.group.WORLD, rank, ranks))
    return timed(model, seq_len // ranks, repeats)


def measure_strand(rank: int, config: CaduceusConfig, seq_len: int, repeats: int) -> tuple[float, int, int]:
    """The same for a rank that has one strand of the whole sequence, which is what one stream costs."""
    return timed(CaduceusForMaskedLM(replace(config, rcps=False)), seq_len, repeats)


def timed(model: CaduceusForMaskedLM, length: int, repeats: int) -> tuple[float, int, int]:
    keep_freed_memory()
    input_ids = torch.randint(7, 11, (1, length))
    labels = torch.where(torch.rand(input_ids.shape) < 0.15, input_ids, IGNORE_LABEL)

    def forward() -> torch.Tensor:
        return model(input_ids, labels, return_logits=False).loss_sum

    losses: list[torch.Tensor] = []
    bytes_forward = count_bytes(lambda: losses.append(forward()))
    bytes_backward = count_bytes(lambda: losses.pop().backward())
    best = float("inf")
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        forward().backward()
        best = min(best, time.perf_counter() - started)
    return best, bytes_forward, bytes_backward


def count_bytes(run: Callable[[], None]) -> int:
    """What this rank gives to the collectives of `ContextGroup` in `run`."""
    given = 0
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def counted_all_gather(parts: list[torch.Tensor], part: torch.Tensor, **options: object) -> None:
        nonlocal given
        given += part.nbytes
        all_gather(parts, part, **options)

    def counted_reduce_scatter(own: torch.Tensor, parts: list[torch.Tensor], **options: object) -> None:
        nonlocal given
        given += sum(part.nbytes for part in parts)
        reduce_scatter(own, parts, **options)

    dist.all_gather, dist.reduce_scatter = counted_all_gather, counted_reduce_scatter
    try:
        run()
    finally:
        dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter
    return given


if __name__ == "__main__":
    main()
