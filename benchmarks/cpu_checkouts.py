"""The ops on a CPU, here and in other checkouts: processor time of forward passes, and of both passes.

    python benchmarks/cpu_checkouts.py CHECKOUT ... [--length 4096] [--channels 512] [--states 16] [--seconds 3]
        [--rounds 5] [--threads 1]

One sequence in fp32 of the backend `cpu`: the scan and the convolution in both directions, with skip, gate and dt bias,
add + RMSNorm of half the channels, and head + loss of these, with 15 % of the bases labelled. Checkouts run in turns,
each in a process of its own, in which each op takes turns for --seconds. For each process it takes the least time of a
turn, after a first that compiles. The table has the least and the most of these over rounds, and the ratio of
the least to that of the first checkout.
"""

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from machine import processor

HERE = Path(__file__).resolve().parents[1]
Turn = Callable[[], tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="+", metavar="CHECKOUT")
    for name, default in (("length", 4096), ("channels", 512), ("states", 16), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(take_turns(options)))
        return
    checkouts = [*(path.resolve() for path in options.checkouts), HERE]
    found: dict[Path, list[dict[str, list[float]]]] = {path: [] for path in checkouts}
    for _, path in itertools.product(range(options.rounds), checkouts):
        found[path].append(run(path, options.threads))
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    print(f"{datetime.date.today()} · {processor()} · {load} · threads: {options.threads}, rounds: {options.rounds}\n")
    print("| op | checkout | forward, processor ms | × | both passes, processor ms | × |\n|---|---|---|---|---|---|")
    for op, path in itertools.product(found[HERE][0], checkouts):
        cells = []
        for passes in (0, 1):
            times, first = ([times[op][passes] for times in found[each]] for each in (path, checkouts[0]))
            cells.append(f"{1000 * min(times):.2f} to {1000 * max(times):.2f} | {min(times) / min(first):.3f}")
        print(f"| {op} | {'this' if path == HERE else path.name} | {' | '.join(cells)} |")


def run(checkout: Path, threads: int) -> dict[str, list[float]]:
    """By op, the least processor seconds of a forward pass and of both passes."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    environment |= {"NUMBA_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--one"]
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(command, env=environment, cwd=directory, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: the ops failed")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(options: argparse.Namespace) -> dict[str, list[float]]:
    import caduceus  # isort: skip: before torch
    from caduceus.allocator import keep_freed_memory

    assert Path(caduceus.__file__).is_relative_to(os.environ["PYTHONPATH"])
    keep_freed_memory()
    best = {}
    for op, turn in turns(options).items():
        turn()
        times, end = [], time.perf_counter() + options.seconds
        while not times or time.perf_counter() < end:
            times.append(turn())
        best[op] = [min(column) for column in zip(*times, strict=True)]
    return best


def turns(options: argparse.Namespace) -> dict[str, Turn]:
    """By op, what runs it forward, and then forward and backward."""
    import torch
    from torch import Tensor

    from caduceus import ops

    torch.manual_seed(0)
    length, channels, states = options.length, options.channels, options.states
    labels = torch.where(torch.rand(1, length) < 0.15, torch.randint(7, 11, (1, length)), -100)

    def turn(op: Callable[..., Tensor], *inputs: Tensor) -> Turn:
        leaves = [tensor.requires_grad_() for tensor in inputs]

        def both() -> tuple[float, float]:
            start = time.process_time()
            with torch.no_grad():
                gradient = torch.ones_like(op(*leaves))
            middle = time.process_time()
            torch.autograd.grad(op(*leaves), leaves, gradient)
            return middle - start, time.process_time() - middle

        return both

    def scan(*operands: Tensor) -> Tensor:
        return ops.bidirectional_scan(*operands, backend="cpu")

    def convolution(*operands: Tensor) -> Tensor:
        return ops.bidirectional_conv1d(*operands, backend="cpu")

    def norm(*operands: Tensor) -> Tensor:
        return torch.cat(ops.add_norm(*operands, eps=1e-5, backend="cpu"))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.head_cross_entropy(hidden, weight, labels, ignore_label=-100, backend="cpu")[0]

    runs, width = (2, 1, 1, length), channels // 2
    A = -torch.arange(1.0, states + 1).repeat(2, channels, 1)
    scanned = [torch.randn(*runs, n) for n in (channels, channels, states, states)]
    skip, bias = torch.ones(2, channels), torch.full((2, channels), -4.0)
    return {
        "scan": turn(scan, *scanned[:2], A, *scanned[2:], skip, torch.randn(*runs[1:], channels), bias),
        "convolution": turn(
            convolution, torch.randn(*runs[1:], channels), torch.randn(2, channels, 4), torch.randn(2, channels)
        ),
        "add + norm": turn(norm, *(torch.randn(*runs[1:], width) for _ in "xr"), torch.ones(width)),
        "head + loss": turn(loss, torch.randn(*runs[1:], width), torch.randn(1, 16, width)),
    }


if __name__ == "__main__":
    main()
