"""Finds the tile sizes with which the Triton kernels are fastest on this machine's GPU.

    python benchmarks/gpu_sweep.py [--ops scan convolution loss] [--channels 512] [--length 131072] [--batch 1]
        [--streams 1] [--states 16] [--repeats 5] [--minutes 8]

It runs forward and backward of each op in bf16, in both directions. It tries the values of one constant of the package
after the other, with the best ones so far for the others. Every result is compared with that of the present constants,
and one that differs is never the best. It prints as it goes. After --minutes, which the ops share, or on Ctrl-C, it
ends with what it has found. It does not change the constants: write what is better into caduceus/ops/triton by hand.

More than one stage can move a loop's loads before its own stores, which a comparison may miss: use it only for kernels
whose loops only read. Without a GPU it says so; `--device cpu` runs the sweep in Triton's interpreter, at sizes that
you give.
"""

import argparse
import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu import CommandLine, device_name, give_memory_back, positive
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import TritonError
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from caduceus.alphabet import IGNORE_LABEL
from caduceus.ops import bidirectional_conv1d, bidirectional_scan, head_cross_entropy
from caduceus.ops.triton import conv, cross_entropy, device, scan, scan_launches

TOLERANCE = 1.6e-2
"""Most difference from the results of the constants as they are, relative to the largest value: each is rounded to bf16
twice, by 2^-8, where the sum over directions waits in the output."""


class Tunable(NamedTuple):
    name: str
    values: tuple[int, ...]
    apply: Callable[[int], list[tuple[object, str, object]]]
    """The attributes, or items of a dict, that a value stands for."""


class Timing(NamedTuple):
    seconds: float
    kernels: dict[str, float]
    """Seconds in each kernel."""


def constants(module: object, *names: str) -> Callable[[int], list[tuple[object, str, object]]]:
    return lambda value: [(module, name, value) for name in names]


CHUNK = Tunable(
    "chunk",
    (64, 128, 256, 512, 1024),
    lambda value: [(module, "tokens_per_program", lambda *_: value) for module in (scan, conv)],
)
WARPS = Tunable(
    "WARPS",
    (2, 4, 8),
    lambda value: [
        *constants(device, "WARPS")(value),
        *constants(device, "CHANNELS")(32 * value),
        *constants(device.LAUNCH, "num_warps")(value),
    ],
)
STAGES = Tunable("num_stages", (1, 2, 3), constants(device.LAUNCH, "num_stages"))
TUNABLES = {
    "scan": [
        CHUNK,
        WARPS,
        Tunable("PIECE", (4, 8, 16), constants(scan_launches, "PIECE")),
        Tunable("UNROLL", (1, 2, 4), constants(scan_launches, "UNROLL")),
        Tunable("WIDE_STATES", (0, 16, 32), constants(scan_launches, "WIDE_STATES")),
        Tunable("REPLAY_BYTES", tuple(2**n for n in range(28, 34)), constants(scan_launches, "REPLAY_BYTES")),
        STAGES,
    ],
    "convolution": [
        CHUNK,
        WARPS,
        Tunable("TOKENS", (16, 32, 64), constants(conv, "TOKENS")),
        Tunable("CHANNELS", (32, 64, 128), constants(conv, "CHANNELS")),
        Tunable("STEPS", (4, 8, 16), constants(conv, "STEPS")),
        STAGES,
    ],
    "loss": [
        Tunable("ROWS", (16, 32, 64, 128), constants(cross_entropy, "ROWS")),
        Tunable("CHANNELS", (32, 64, 128), constants(cross_entropy, "CHANNELS")),
        Tunable("num_warps", (2, 4, 8), constants(device.LAUNCH, "num_warps")),
        STAGES,
    ],
}


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--ops", nargs="+", choices=TUNABLES, default=list(TUNABLES))
    for name, default in (("channels", 512), ("length", 131_072), ("batch", 1), ("streams", 1), ("states", 16)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--repeats", type=positive, default=5, help="the best of so many counts (5)")
    parser.add_argument("--minutes", type=float, default=8, help="nothing begins after them (8)")
    options = parser.parse_or_leave()
    if options.streams > 2 or not options.minutes > 0:
        parser.error("--streams: 1 or 2 strands; --minutes: more than 0")
    deadline = time.monotonic() + 60 * options.minutes
    sizes = f"{options.streams} x {options.batch} x {options.length} x {options.channels}, {options.states} states"
    print(f"{datetime.date.today()} · {device_name(options.device)} · torch {torch.__version__} · {sizes}, bf16")
    ops = list(dict.fromkeys(options.ops))
    for number, op in enumerate(ops):
        now = time.monotonic()
        torch.manual_seed(0)
        with torch.device(options.device):
            run = OPS[op](options)
        sweep(op, run, options, now + (deadline - now) / (len(ops) - number))


def sweep(op: str, run: Callable[[], list[Tensor]], options: argparse.Namespace, deadline: float) -> None:
    expected = run()  # also compiles
    timing = best = measure(run, options)
    print(f"\n{op} as it is: {1e3 * timing.seconds:.3f} ms\n\n| {op} | value | ms | |\n|---|---|---|---|", flush=True)
    chosen: dict[str, tuple[Tunable, int]] = {}
    interrupted = False
    try:
        for tunable, value in ((t, value) for t in TUNABLES[op] for value in t.values):
            if time.monotonic() > deadline:
                print("\nits share of --minutes is over")
                break
            trial = {**chosen, tunable.name: (tunable, value)}
            found, told = attempt(trial, run, expected, options)
            if found is not None and found.seconds < best.seconds:
                best, chosen, told = found, trial, "best so far"
            cost = "-" if found is None else f"{1e3 * found.seconds:.3f}"
            print(f"| {tunable.name} | {value} | {cost} | {told} |", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted")
        interrupted = True
    settings = ", ".join(f"{name} {value}" for name, (_, value) in chosen.items()) or "as it is"
    print(f"\n{op}, best: {settings}: {1e3 * best.seconds:.3f} ms, {timing.seconds / best.seconds:.2f} times as fast\n")
    print("| kernel | ms as it is | ms at the best |\n|---|---|---|")
    for name in timing.kernels:
        print(f"| {name} | {1e3 * timing.kernels[name]:.3f} | {1e3 * best.kernels.get(name, 0):.3f} |", flush=True)
    if interrupted:
        sys.exit(130)


def attempt(
    trial: dict[str, tuple[Tunable, int]],
    run: Callable[[], list[Tensor]],
    expected: list[Tensor],
    options: argparse.Namespace,
) -> tuple[Timing | None, str]:
    """The timing with these values; None, and why, where they do not run or give something else."""
    try:
        with applied(trial):
            error = max(map(error_of, run(), expected))
            if not error < TOLERANCE:
                return None, f"WRONG: differs by {error:.1e}"
            return measure(run, options), ""
    except (TritonError, CompilationError, ValueError, torch.OutOfMemoryError) as problem:
        return None, f"does not run: {' '.join(str(problem).split())[:80]}"
    finally:
        give_memory_back(options.device)


@contextlib.contextmanager
def applied(trial: dict[str, tuple[Tunable, int]]) -> Iterator[None]:
    """The constants of the package as `trial` has them, and then as they were."""
    before = []
    try:
        for tunable, value in trial.values():
            for owner, name, new in tunable.apply(value):
                where = owner if isinstance(owner, dict) else vars(owner)
                before.append((where, name, where[name]))
                where[name] = new
        yield
    finally:
        for where, name, old in reversed(before):
            where[name] = old


def error_of(found: Tensor, expected: Tensor) -> float:
    error = ((found.float() - expected.float()).abs().max() / expected.abs().max().float()).item()
    return error if error == error else torch.inf


def measure(run: Callable[[], object], options: argparse.Namespace) -> Timing:
    """The best of all repeats, and the time in the kernels in that one."""
    best = Timing(float("inf"), {})
    for _ in range(options.repeats):
        with timed_launches(options.device) as total:
            clock = Clock(options.device)
            run()
            seconds = clock.stop()
        if seconds < best.seconds:
            best = Timing(seconds, total())
    return best


class Clock:
    """Seconds from its making to `stop`, on the device's own clock."""

    def __init__(self, device_type: str) -> None:
        self.on_gpu = device_type == "cuda"
        self.began = self._now()

    def mark(self) -> None:
        self.ended = self._now()

    def seconds(self) -> float:
        """After `mark`; waits for the device."""
        if not self.on_gpu:
            return self.ended - self.began
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1e3

    def stop(self) -> float:
        self.mark()
        return self.seconds()

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextlib.contextmanager
def timed_launches(device_type: str) -> Iterator[Callable[[], dict[str, float]]]:
    """Puts a clock around every launch; gives what asks for the sums by kernel."""
    clocks: list[tuple[str, Clock]] = []
    originals = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def timed(original: Callable) -> Callable:
        def launch(kernel: JITFunction | InterpretedFunction, *arguments: Any, **options: Any) -> Any:
            clock = Clock(device_type)
            result = original(kernel, *arguments, **options)
            clock.mark()
            clocks.append((kernel.fn.__name__, clock))
            return result

        return launch

    def sums() -> dict[str, float]:
        total: dict[str, float] = {}
        for name, clock in clocks:
            total[name] = total.get(name, 0) + clock.seconds()
        return total

    for kind, original in originals.items():
        kind.run = timed(original)
    try:
        yield sums
    finally:
        for kind, original in originals.items():
            kind.run = original


def scan_op(options: argparse.Namespace) -> Callable[[], list[Tensor]]:
    runs = (2, options.streams, options.batch, options.length)
    u, dt = (torch.randn(*runs, options.channels, dtype=torch.bfloat16) for _ in range(2))
    B, C = (torch.randn(*runs, options.states, dtype=torch.bfloat16) for _ in range(2))
    z = torch.randn(*runs[1:], options.channels, dtype=torch.bfloat16)
    A = -torch.arange(1.0, options.states + 1).repeat(2, options.channels, 1)
    D, bias = torch.ones(2, options.channels), torch.full((2, options.channels), -4.0)
    return with_gradients(partial(bidirectional_scan, backend="triton"), [u, dt, A, B, C, D, z, bias])


def convolution_op(options: argparse.Namespace) -> Callable[[], list[Tensor]]:
    x = torch.randn(options.streams, options.batch, options.length, options.channels, dtype=torch.bfloat16)
    weight, bias = torch.randn(2, options.channels, 4), torch.randn(2, options.channels)
    return with_gradients(partial(bidirectional_conv1d, backend="triton"), [x, weight, bias])


def loss_op(options: argparse.Namespace) -> Callable[[], list[Tensor]]:
    D = max(1, options.channels // 2)  # of the model
    hidden = torch.randn(options.streams, options.batch, options.length, D, dtype=torch.bfloat16)
    labels = torch.randint(7, 11, hidden.shape[1:3])
    labels[torch.rand(labels.shape) > 0.15] = IGNORE_LABEL

    def run(hidden: Tensor, head: Tensor) -> Tensor:
        return head_cross_entropy(hidden, head, labels, ignore_label=IGNORE_LABEL, backend="triton")[0]

    return with_gradients(run, [hidden, torch.randn(options.streams, 16, D)])


OPS = {"scan": scan_op, "convolution": convolution_op, "loss": loss_op}


def with_gradients(op: Callable[..., Tensor], operands: list[Tensor]) -> Callable[[], list[Tensor]]:
    """What runs the op and gives its output and all gradients."""
    leaves = [t.requires_grad_() for t in operands]

    def run() -> list[Tensor]:
        y = op(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    return run


if __name__ == "__main__":
    main()
