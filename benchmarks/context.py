"""Forward and backward pass of one sequence, whole and shared by the ranks of a context group: time, and bytes sent.

    python benchmarks/context.py [--seq-len 65536] [--d-model 64] [--n-layer 2] [--ranks 1 2 4] [--repeats 5]

Every rank computes on one thread, so as many ranks as there are cores can be faster than one; the best of the repeats
counts, by the slowest rank. A rank scans its slice twice, for the state that it passes on and for its outputs.

Bytes are what a rank puts into collectives in one pass, counted where they are called. By the formula, a layer of
Caduceus-PS takes 4 runs (two streams in two directions) of 4 bytes each for B · E · (N + 1) numbers of the scan and
B · E · (K - 1) of the convolution; gradients take as much for each of the R ranks.
"""

import argparse
import datetime
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
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
        seconds = max(result[0] for result in results)
        alone = alone or seconds
        counted = results[0][1]
        forward = by_formula(config) if ranks > 1 else 0
        kilobytes = [counted["forward"], forward, counted["backward"], ranks * forward]
        cells = " | ".join(f"{count / 1e3:,.1f}" for count in kilobytes)
        print(f"| {ranks} | {seconds:.2f} | {alone / seconds:.2f} | {cells} |")


def by_formula(config: CaduceusConfig) -> int:
    """Bytes that a rank gives to all-gathers in a forward pass."""
    return 4 * RUNS * config.n_layer * config.d_inner * (config.d_state + 1 + config.d_conv - 1)


def measure(rank: int, config: CaduceusConfig, seq_len: int, repeats: int) -> tuple[float, Counter]:
    """Best seconds of a pass on this rank, and the bytes that it gave to collectives in one."""
    keep_freed_memory()
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(config)
    if ranks > 1:
        model.share_sequences(ContextGroup(dist.group.WORLD, rank, ranks))
    input_ids = torch.randint(7, 11, (1, seq_len)).tensor_split(ranks, dim=1)[rank]
    labels = torch.where(torch.rand(input_ids.shape) < 0.15, input_ids, IGNORE_LABEL)

    def run() -> None:
        model(input_ids, labels, return_logits=False).loss_sum.backward()

    sent = count_bytes(run)
    best = float("inf")
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best, sent


def count_bytes(run: Callable[[], None]) -> Counter:
    """What a pass gives to the collectives of `ContextGroup`: all-gather forward, reduce-scatter backward."""
    sent: Counter = Counter()
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def counted_all_gather(parts: list[torch.Tensor], part: torch.Tensor, **options: object) -> None:
        sent["forward"] += part.nbytes
        all_gather(parts, part, **options)

    def counted_reduce_scatter(own: torch.Tensor, parts: list[torch.Tensor], **options: object) -> None:
        sent["backward"] += sum(part.nbytes for part in parts)
        reduce_scatter(own, parts, **options)

    dist.all_gather, dist.reduce_scatter = counted_all_gather, counted_reduce_scatter
    try:
        run()
    finally:
        dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter
    return sent


if __name__ == "__main__":
    main()
