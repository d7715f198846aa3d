"""What the GPU's instruction schedulers have to do for a token: counts from the compiled Triton kernels, without a GPU.

    python benchmarks/sass.py [--capability 90] [--element bf16] [--d-model 256] [--streams 1] [--length 131072]

Compiles what a step of pre-training launches (see tests/ops/aot.py) and counts machine instructions per token and warp
(32 threads): the loops, by class, times the trips that a token takes, as the mean over the copies that there are of a
loop for each direction. Of an `if` both sides count. `issue` and `exp` are estimates, NOT measurements: the time per
token and layer if every scheduler issued an instruction every cycle, and if the units for exponentials and reciprocals
(MUFU, which take 8 cycles for a warp) never stood still. Memory, latency and what is outside the loops come on top.
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the tests are not installed
from tests.ops.tools import has_tools

if not has_tools():
    print("no triton here that brings ptxas and cuobjdump (Linux only): nothing to do")
    sys.exit(0)

from caduceus.config import CaduceusConfig
from caduceus.ops.triton import conv, device, scan_launches
from tests.ops.aot import compiling, disassembled, resources, train

CLASSES = {
    "FP": ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "HFMA2", "F2F", "F2FP"),
    "MUFU": ("MUFU",),
    "MMA": ("HMMA", "HGMMA"),
    "global": ("LDG", "STG"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "local": ("LDL", "STL"),
    "SHFL": ("SHFL",),
    "BAR": ("BAR",),
}
"""All others are index arithmetic, moves, predicates and branches."""
GPUS = {80: ("A100", 108, 1.41e9), 90: ("H100 SXM", 132, 1.755e9)}
"""Name, multiprocessors and boost clock in Hz; each multiprocessor has four schedulers of one instruction a cycle."""
MUFU_CYCLES = 8
"""Of a scheduler's unit, for the 32 threads of a warp."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=sorted(GPUS), default=90)
    parser.add_argument("--element", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--streams", type=int, choices=[1, 2], default=1)
    parser.add_argument("--length", type=int, default=131_072)
    options = parser.parse_args()
    config = CaduceusConfig(d_model=options.d_model, n_layer=1, rcps=options.streams == 2)
    name, multiprocessors, clock = GPUS[options.capability]
    with compiling(options.capability) as found:
        train(config, 1, options.length, options.element)
    at_once = "chunk_adjoint" not in found
    trips, work = (
        trips_of_loops(config.d_state, options.length, at_once),
        work_per_token(config, options.streams, at_once),
    )
    titles = [
        "kernel",
        "registers",
        "shared",
        "spills",
        "warps/SM",
        "instructions",
        *CLASSES,
        "others",
        "issue, ns",
        "exp, ns",
    ]
    print(f"sm_{options.capability}, {options.element}, d_inner {config.d_inner}, {config.d_state} states\n")
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    sum_of_instructions = sum_of_time = 0.0
    for kernel, per_token in trips.items():
        (compiled,) = found[kernel]
        used, code = resources(compiled), disassembled(compiled)
        classes = per_token_and_warp(code, per_token)
        spills = sum(class_of(name) == "local" for _, name, _ in code)
        instructions = sum(classes.values())
        issue, exp = (
            cycles * work[kernel] / (multiprocessors * 4 * clock) * 1e9
            for cycles in (instructions, MUFU_CYCLES * classes["MUFU"])
        )
        sum_of_instructions += instructions * work[kernel]
        sum_of_time += max(issue, exp)
        columns = [used["registers"], used["shared"], spills, resident_warps(used), f"{instructions:.0f}"]
        columns += [f"{classes[c]:.0f}" for c in (*CLASSES, "others")] + [f"{issue:.1f}", f"{exp:.1f}"]
        print("| " + " | ".join(map(str, [kernel, *columns])) + " |")
    print(
        f"\nA layer: {sum_of_instructions:,.0f} warp instructions per token. Estimate, not measured: with the longer "
        f"of both times for each, these kernels would take an {name} {sum_of_time:.0f} ns per token and layer."
    )


def trips_of_loops(states: int, length: int, at_once: bool) -> dict[str, list[float]]:
    """How often a token goes through the innermost loops of a kernel, and through those around them."""
    unrolled, piece = 1 / math.gcd(length, scan_launches.UNROLL), 1 / scan_launches.PIECE
    trips = {"chunk_state": [unrolled], "scan_forward": [unrolled]}
    trips |= {"scan_replay": [1, piece]} if at_once else {"chunk_adjoint": [unrolled], "scan_replay": [unrolled, piece]}
    return trips | {
        "scan_backward": [states / scan_launches.GROUP * piece, piece],
        "conv_backward": [1 / conv.STEPS],
    }


def work_per_token(config: CaduceusConfig, streams: int, at_once: bool) -> dict[str, float]:
    """Warps times rows that a token of the input occupies in each kernel."""
    warps = -(-config.d_inner // device.CHANNELS) * device.WARPS * streams
    wide = config.d_state <= scan_launches.WIDE_STATES and warps // streams // device.WARPS % 2 == 0
    work = dict.fromkeys(("chunk_state", "scan_forward", "chunk_adjoint", "scan_replay"), 2 * warps / (1 + wide))
    if at_once:
        work["scan_replay"] = 2 * warps
    return work | {"scan_backward": 2 * warps, "conv_backward": warps}  # which takes both directions in one turn


def per_token_and_warp(code: list[tuple[int, str, str]], trips: list[float]) -> Counter:
    loops = []
    for address, name, operands in code:
        target = operands.rpartition("0x")[2].strip()
        if name.startswith("BRA") and "0x" in operands and int(target, 16) < address:
            loops.append((int(target, 16), address))
    inner = [loop for loop in loops if not any(encloses(loop, other) for other in loops)]
    outer = [loop for loop in loops if loop not in inner and all(x in inner for x in loops if encloses(loop, x))]
    # What unrolling leaves over runs at the end of a sequence only: a fraction of the exponentials tells it.
    own = {loop: instructions_of(code, loop, []) for loop in inner}
    most = max(counts["MUFU"] for counts in own.values())
    main = [counts for counts in own.values() if counts["MUFU"] > 0.75 * most]
    around = [instructions_of(code, loop, inner) for loop in outer]
    total: Counter = Counter()
    for copies, times in zip((main, around), trips, strict=False):
        for counts in copies:
            for label, count in counts.items():
                total[label] += count * times / len(copies)
    return total


def encloses(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop != other and loop[0] <= other[0] and other[1] <= loop[1]


def instructions_of(code: list[tuple[int, str, str]], loop: tuple[int, int], without: list[tuple[int, int]]) -> Counter:
    """By class; those of the loops `without` are not counted."""
    return Counter(
        class_of(name)
        for address, name, _ in code
        if loop[0] <= address <= loop[1] and not any(first <= address <= last for first, last in without)
    )


def class_of(name: str) -> str:
    operation = name.split(".")[0]
    return next((label for label, operations in CLASSES.items() if operation in operations), "others")


def resident_warps(used: dict) -> int:
    """Of a multiprocessor, by registers (65,536, given out by 8 to each thread of a block) and at most 64."""
    registers = -(-used["registers"] // 8) * 8
    return min(64, 65_536 // (registers * 32 * device.WARPS) * device.WARPS)


if __name__ == "__main__":
    main()
