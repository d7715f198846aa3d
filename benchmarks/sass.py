"""What the GPU's instruction schedulers have to do for a token: counts from the compiled Triton kernels, without a GPU.

    python benchmarks/sass.py [--capability 90] [--element bf16] [--d-model 256] [--streams 1] [--length 131072]

Compiles what a step of pre-training launches (see tests/ops/aot.py) and counts machine instructions per token and warp
(32 channels): the inner loops, by class, times the trips that a token takes. `issue` is an estimate, NOT a measurement:
the time per token and layer if every scheduler issued an instruction every cycle. Memory, latency and the loops'
prologues come on top.
"""

import argparse
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
    trips, work = trips_of_loops(config.d_state), work_per_token(config, options.streams)
    titles = ["kernel", "registers", "shared", "spills", "warps/SM", "instructions", *CLASSES, "others", "issue, ns"]
    print(f"sm_{options.capability}, {options.element}, d_inner {config.d_inner}, {config.d_state} states\n")
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    sum_of_instructions = sum_of_time = 0.0
    for kernel, per_token in trips.items():
        (compiled,) = found[kernel]
        used, code = resources(compiled), disassembled(compiled)
        classes = per_token_and_warp(code, per_token)
        spills = sum(class_of(name) == "local" for _, name, _ in code)
        instructions = sum(classes.values())
        nanoseconds = instructions * work[kernel] / (multiprocessors * 4 * clock) * 1e9
        sum_of_instructions += instructions * work[kernel]
        sum_of_time += nanoseconds
        columns = [used["registers"], used["shared"], spills, resident_warps(used), f"{instructions:.0f}"]
        columns += [f"{classes[c]:.0f}" for c in (*CLASSES, "others")] + [f"{nanoseconds:.1f}"]
        print("| " + " | ".join(map(str, [kernel, *columns])) + " |")
    print(
        f"\nA layer: {sum_of_instructions:,.0f} warp instructions per token. Estimate, not measured: at one per cycle "
        f"and scheduler an {name} would take {sum_of_time:.0f} ns per token and layer for these kernels."
    )


def trips_of_loops(states: int) -> dict[str, list[float]]:
    """How often a token goes through each loop of a kernel, innermost first, without the loops inside it."""
    piece = [states / scan_launches.GROUP / scan_launches.PIECE, 1 / scan_launches.PIECE]
    return {
        "chunk_state": [1],
        "scan_forward": [1],
        "chunk_adjoint": [1],
        "scan_replay": [1],
        "scan_backward": piece,
        "conv_backward": [1 / conv.STEPS],
    }


def work_per_token(config: CaduceusConfig, streams: int) -> dict[str, float]:
    """Warps (32 channels) times rows that a token of the input occupies in each kernel."""
    warps = -(-config.d_inner // device.CHANNELS) * device.WARPS * streams
    both = dict.fromkeys(("chunk_state", "scan_forward", "chunk_adjoint", "scan_replay", "scan_backward"), 2 * warps)
    return both | {"conv_backward": warps}  # which takes both directions in one turn of its loop


def per_token_and_warp(code: list[tuple[int, str, str]], trips: list[float]) -> Counter:
    loops = []
    for address, name, operands in code:
        target = operands.rpartition("0x")[2].strip()
        if name.startswith("BRA") and "0x" in operands and int(target, 16) < address:
            loops.append((int(target, 16), address))
    loops.sort(key=lambda loop: loop[1] - loop[0])
    counts, seen = Counter(), set()
    for (first, last), times in zip(loops, trips, strict=False):
        for address, name, _ in code:
            if first <= address <= last and address not in seen:
                seen.add(address)
                counts[class_of(name)] += times
    return counts


def class_of(name: str) -> str:
    operation = name.split(".")[0]
    return next((label for label, operations in CLASSES.items() if operation in operations), "others")


def resident_warps(used: dict) -> int:
    """Of a multiprocessor, by registers (65,536, given out by 8 to each thread of a block) and at most 64."""
    registers = -(-used["registers"] // 8) * 8
    return min(64, 65_536 // (registers * 32 * device.WARPS) * device.WARPS)


if __name__ == "__main__":
    main()
