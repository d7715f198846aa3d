"""What a block of the model costs a GPU, kernel by kernel: from machine code and counted bytes, without a GPU.

    python benchmarks/sass.py [--capability 90] [--element bf16] [--d-model 256] [--streams 1] [--batch 1]
        [--length 131072] [--keep] [--mixer mamba2 --d-state 64] [--order]

Compiles what a step of pre-training launches (see tests/ops/aot.py). First table: machine instructions per token and
warp (32 threads), as the loops times the trips that a token takes, the mean over the copies that there are of a loop
for each direction; of an `if` both sides count. Second table: all that a second block adds to a step, forward and
backward, with --keep by states that the forward pass keeps. All times are estimates for a token and block, NOT
measurements:

    issue, exp  if every scheduler issued an instruction every cycle; if the units for exponentials and reciprocals
                (MUFU) never stood still
    modelled    what benchmarks/scheduler.py leaves of that: dependencies, pipes and the latency of loads, by the level
                of memory in LEVELS; divided by the share of the multiprocessors' places that the blocks of a launch
                fill
    DRAM        bytes at 85 % of the card's bandwidth; a batched product whose sum runs over tokens draws what the
                multiprocessors with a tile of its output can
    flops       products at 70 % of the dense peak rate

A row takes the longest of its times. Launches are those of the forward + those of the backward pass. Of Mamba-2's
kernels only the bytes are counted, neither products nor exponentials within them. --order lists in which order the
innermost loops read and write tensors.
"""

import argparse
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # the tests are not installed
from tests.ops.tools import has_tools

if not has_tools():
    print("no triton here that brings ptxas and cuobjdump (Linux only): nothing to do")
    sys.exit(0)

from pointers import MEMORY, tensors
from scheduler import CYCLES, operation_of, simulate, steps, wavefronts
from traffic import Traffic, launches, of_a_layer, outside, step

from caduceus.config import CaduceusConfig
from caduceus.ops.triton import conv, device, scan_launches
from caduceus.ops.triton.scan_backward_kernels import STATES
from tests.ops.aot import Instruction, compiling, disassembled, resources, untrained

CLASSES = {
    "FP": ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "HFMA2", "F2F", "F2FP"),
    "MUFU": ("MUFU",),
    "MMA": ("HMMA", "HGMMA"),
    "global": ("LDG", "STG", "LDGSTS"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "local": ("LDL", "STL"),
    "SHFL": ("SHFL",),
    "BAR": ("BAR",),
}
"""All others are index arithmetic, moves, predicates and branches."""


class Card(NamedTuple):
    name: str
    multiprocessors: int
    clock: float
    """Hz at boost; each multiprocessor has four schedulers of one instruction a cycle."""
    bandwidth: float
    """Bytes a second."""
    flops: float
    """Dense, bf16."""
    shared: int
    """Bytes of a multiprocessor for its blocks."""


CARDS = {
    80: Card("A100 SXM 80 GB", 108, 1.41e9, 2.04e12, 312e12, 164 * 1024),
    90: Card("H100 SXM", 132, 1.755e9, 3.35e12, 989e12, 228 * 1024),
}
LEVELS = {
    **dict.fromkeys(("u", "dt", "z", "x", "dout", "out", "dz", "y", "kept"), "DRAM"),
    **dict.fromkeys(("B", "C", "pieces", "w"), "L2"),
    **dict.fromkeys(("A", "adjoint", "dA", "state", "bias", "D"), "L1"),
}
"""Where a loop's loads find a tensor. What is loaded again after the loops within a loop is in L1."""
MUFU_CYCLES = 8
"""Cycles that a scheduler's unit takes for the 32 threads of a warp."""
ONE_DRAWS = 64
"""Bytes a cycle that a multiprocessor can draw from L2."""


class Loop(NamedTuple):
    """The innermost loop of a kernel that does the work, or one around it."""

    first: int
    last: int

    def holds(self, other: "Loop") -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=sorted(CARDS), default=90)
    parser.add_argument("--element", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--streams", type=int, choices=[1, 2], default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--mixer", choices=["mamba", "mamba2"], default="mamba")
    parser.add_argument("--d-state", type=int, default=16)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--order", action="store_true")
    options = parser.parse_args()
    with compiling(options.capability) as found:
        steps_of = []
        for blocks in (1, 2):
            network = untrained(model(options, blocks), keep=options.keep)
            steps_of.append(step(network, options.batch, options.length, options.element))
    config, scanning = model(options, 1), set(found) if options.mixer == "mamba" else set()
    trips = trips_of_loops(config.d_state, options.length, scanning, options.element)
    kernels = {name: Kernel(name, found[name][0], trips[name], options.capability) for name in trips}
    work = work_per_token(config, options.streams, scanning)
    print(f"sm_{options.capability}, {options.element}, d_inner {config.d_inner}, {config.d_state} states\n")
    print_counts(kernels)
    layer, card, tokens = of_a_layer(*steps_of), CARDS[options.capability], options.batch * options.length
    print_times(kernels, work, layer, tokens, card)
    rest = outside(steps_of[0], layer)
    print(
        f"Embedding, head and loss, once: {passes(rest)} launches, "
        f"{sum(t.bytes for t in rest.values()) / tokens:,.0f} bytes, DRAM "
        f"{sum(dram_time(t, tokens, card) for t in rest.values()):.0f} ns per token."
    )
    if options.order:
        for name, kernel in kernels.items():
            print(f"\n{name}: {kernel.order()}")


def model(options: argparse.Namespace, blocks: int) -> CaduceusConfig:
    keys = {"d_model": options.d_model, "d_state": options.d_state, "mixer": options.mixer}
    return CaduceusConfig(**keys, n_layer=blocks, rcps=options.streams == 2)


def passes(of: dict[str, Traffic]) -> str:
    return " + ".join(map(str, launches(of)))


def print_counts(kernels: dict[str, "Kernel"]) -> None:
    titles = ("kernel", "registers", "shared", "spills", "blocks/SM", "instructions", *CLASSES, "others")
    print_row(titles)
    print("|---" * len(titles) + "|")
    for name, kernel in kernels.items():
        counts = kernel.classes()
        shown = [f"{counts[label]:.0f}" for label in (*CLASSES, "others")]
        print_row((name, *kernel.resources(), f"{sum(counts.values()):.0f}", *shown))


def print_times(
    kernels: dict[str, "Kernel"], work: dict[str, float], layer: dict[str, Traffic], tokens: int, card: Card
) -> None:
    titles = ("kernel or operator", "launches", "bytes", "L1 wavefronts", "shared wavefronts", "issue, ns", "exp, ns")
    titles += ("modelled, ns", "utilisation", "filled", "DRAM, ns", "flops, ns", "longest, ns")
    print()
    print_row(titles)
    print("|---" * len(titles) + "|")
    total = rest = 0.0
    left: dict[str, Traffic] = {}
    for name, traffic in sorted(layer.items(), key=lambda item: item[0] not in kernels):
        times = [dram_time(traffic, tokens, card), traffic.flops / tokens / (0.7 * card.flops) * 1e9]
        columns: list[str] = [""] * 7
        if name in kernels:
            columns, modelled = kernels[name].times(work[name], traffic.programs, card)
            times.append(modelled)
        longest = max(times)
        total += longest
        if longest < 0.05:
            rest += longest
            left[name] = traffic
            continue
        shown = [f"{time:.1f}" if time >= 0.05 else "" for time in times[:2]]
        print_row((name, passes({name: traffic}), f"{traffic.bytes / tokens:,.0f}", *columns, *shown, f"{longest:.1f}"))
    bytes_left, moved = (sum(traffic.bytes for traffic in of.values()) / tokens for of in (left, layer))
    print_row(("all others", passes(left), f"{bytes_left:,.0f}", *[""] * 9, f"{rest:.1f}"))
    print(
        f"\nA block, forward + backward: {passes(layer)} launches, {moved:,.0f} bytes. "
        f"Estimate, not measured: {total:.0f} ns per token on an {card.name}."
    )


def print_row(columns: tuple) -> None:
    print("| " + " | ".join(map(str, columns)) + " |")


def dram_time(traffic: Traffic, tokens: int, card: Card) -> float:
    rate = 0.85 * card.bandwidth
    if traffic.tiles is not None:
        rate = min(rate, traffic.tiles * ONE_DRAWS * card.clock)
    return traffic.bytes / tokens / rate * 1e9


def trips_of_loops(states: int, length: int, launched: set[str], element: str) -> dict[str, list[float]]:
    """How often a token goes through the innermost loops of a kernel, and through those around them."""
    unrolled, piece = 1 / math.gcd(length, scan_launches.UNROLL), 1 / scan_launches.PIECE
    groups = [states / scan_launches.GROUP * piece]
    if element == "bf16" and states % scan_launches.WARP_GROUP == 0:
        groups = [states / count * piece for count in (STATES.value, scan_launches.WARP_GROUP)]
    trips = {
        "chunk_state": [1 / math.gcd(length, scan_launches.STATE_UNROLL) if element == "bf16" else unrolled],
        "scan_forward": [unrolled],
        "chunk_adjoint": [unrolled],
        "chunk_adjoint_dz": [unrolled],
        "scan_replay": [unrolled, piece],
        "scan_keep": [1, piece],
        "scan_backward": [*groups, piece],
        "conv_backward": [1 / conv.STEPS],
    }
    return {name: times for name, times in trips.items() if name in launched}


def work_per_token(config: CaduceusConfig, streams: int, launched: set[str]) -> dict[str, float]:
    """Warps times rows that a token of the input occupies in each kernel."""
    warps = -(-config.d_inner // device.CHANNELS) * device.WARPS * streams
    wide = config.d_state <= scan_launches.WIDE_STATES and warps // streams // device.WARPS % 2 == 0
    work = dict.fromkeys(
        ("chunk_state", "scan_forward", "chunk_adjoint", "chunk_adjoint_dz", "scan_replay", "scan_keep"),
        2 * warps / (1 + wide),
    )
    return work | {"scan_backward": 2 * warps, "conv_backward": warps}  # which takes both directions in one turn


class Kernel:
    """A compiled kernel with loops over tokens. `trips` as `trips_of_loops` has them."""

    def __init__(self, name: str, compiled, trips: list[float], capability: int) -> None:
        self.name, self.trips, self.card = name, trips, CARDS[capability]
        self.used, self.code = resources(compiled), disassembled(compiled)
        self.tensors = tensors(self.code, compiled.src.signature, capability)
        self.loops = self._loops()
        self.copies = [self._turn(chain) for chain in self._chains()]
        """Instructions of a turn of the outermost loop that counts, and whether each comes after an inner loop."""

    def resources(self) -> tuple[int, int, int, int]:
        spills = sum(class_of(i.name) == "local" for i in self.code)
        return self.used["registers"], self.used["shared"], spills, self.blocks()

    def blocks(self) -> int:
        """Resident on a multiprocessor by registers (65,536, given out by 8 to a thread), shared memory and threads."""
        registers = -(-self.used["registers"] // 8) * 8
        threads = 32 * device.WARPS
        return min(2048 // threads, 65_536 // (registers * threads), self.card.shared // (self.used["shared"] + 1024))

    def classes(self) -> Counter:
        """How many instructions of each class there are, per token and warp."""
        return self._per_token(lambda instruction: (class_of(instruction.name), 1))

    def times(self, work: float, programs: int, card: Card) -> tuple[list[str], float]:
        """(columns from L1 wavefronts to how far the card is filled, modelled ns)."""
        a_cycle = work / (card.multiprocessors * 4 * card.clock) * 1e9
        counts = self.classes()
        moved = self._per_token(
            lambda i: (
                (operation_of(i) in MEMORY, wavefronts(i)) if class_of(i.name) in ("global", "shared") else ("", 0)
            )
        )
        issued = [self._simulated(turn) for turn in self.copies]
        cycles = sum(i.cycles for i in issued) / len(issued) * self.trips[-1]
        used = sum(i.utilisation for i in issued) / len(issued)
        waves = programs / (card.multiprocessors * self.blocks())
        modelled = cycles * a_cycle / (waves / math.ceil(waves))
        columns = [f"{moved[True]:.0f}", f"{moved[False]:.0f}", f"{sum(counts.values()) * a_cycle:.1f}"]
        columns += [f"{MUFU_CYCLES * counts['MUFU'] * a_cycle:.1f}", f"{modelled:.1f}", f"{used:.2f}"]
        return [*columns, f"{waves / math.ceil(waves):.2f}"], modelled

    def order(self) -> str:
        """What a turn of the innermost loop reads and writes, in this order, as the machine's instructions."""
        named = []
        for instruction in self._within(self._chains()[0][0]):
            if operation_of(instruction) in (*MEMORY, "BAR"):
                named.append(f"{operation_of(instruction)} {self.tensors.get(instruction.address, '')}".strip())
        return ", ".join(f"{name} x{len(list(same))}" for name, same in itertools.groupby(named))

    def _simulated(self, turn: list[tuple[Instruction, bool]]):
        again = {id(instruction) for instruction, is_again in turn if is_again}

        def latency_of(instruction: Instruction) -> int:
            level = LEVELS.get(self.tensors.get(instruction.address, ""), "DRAM")
            return CYCLES["L1" if id(instruction) in again else level]

        turns = max(5, min(40, 20_000 // len(turn)))
        return simulate(steps([i for i, _ in turn], latency_of), self.blocks() * device.WARPS // 4, turns)

    def _per_token(self, weigh: Callable[[Instruction], tuple]) -> Counter:
        total: Counter = Counter()
        for turn in self.copies:
            for instruction, _ in turn:
                label, weight = weigh(instruction)
                total[label] += weight * self.trips[-1] / len(self.copies)
        return total

    def _loops(self) -> list[Loop]:
        found = []
        for instruction in self.code:
            _, is_absolute, target = instruction.operands.rpartition("0x")
            is_jump = instruction.name.startswith("BRA") and is_absolute
            if is_jump and int(target, 16) < instruction.address:
                found.append(Loop(int(target, 16), instruction.address))
        return found

    def _chains(self) -> list[list[Loop]]:
        """Innermost loops, each with those around it. What unrolling leaves over runs at the end of a sequence only: a
        fraction of the exponentials tells it."""
        inner = [loop for loop in self.loops if not any(loop.holds(other) for other in self.loops)]
        exps = {loop: sum(class_of(i.name) == "MUFU" for i in self._within(loop)) for loop in inner}
        main = [loop for loop in inner if exps[loop] > 0.75 * max(exps.values())]
        chains = []
        for loop in main:
            around = sorted((o for o in self.loops if o.holds(loop)), key=lambda o: o.last - o.first)
            chains.append([loop, *around][: len(self.trips)])
        return chains

    def _within(self, loop: Loop) -> list[Instruction]:
        return [i for i in self.code if loop.first <= i.address <= loop.last]

    def _turn(self, chain: list[Loop]) -> list[tuple[Instruction, bool]]:
        turn = [(instruction, False) for instruction in self._within(chain[0])]
        for level, (loop, inside) in enumerate(zip(chain[1:], chain, strict=False), 1):
            others = [o for o in self.loops if loop.holds(o) and o != inside and not o.holds(inside)]
            repeats = round(self.trips[level - 1] / self.trips[level])
            own = [i for i in self._within(loop) if not any(o.first <= i.address <= o.last for o in others)]
            before = [(i, False) for i in own if i.address < inside.first]
            after = [(i, True) for i in own if i.address > inside.last]
            turn = [*before, *turn * repeats, *after]
        return turn


def class_of(name: str) -> str:
    operation = name.split(".")[0]
    return next((label for label, operations in CLASSES.items() if operation in operations), "others")


if __name__ == "__main__":
    main()
