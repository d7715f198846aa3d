"""How many kernels and operators a block of the model launches, forward and backward, and what that takes.

    python benchmarks/launches.py [--d-model 256] [--layers 16] [--lengths 131072 32768 8192 2048]

Counted on fake tensors, without a GPU, as for an H100: every kernel of Triton and every operator of PyTorch that runs
in a micro-batch of one sequence, in bf16, without torch.compile. `rest` is what is outside of the blocks: embedding,
last norm, head and loss. The last two columns are estimates, NOT measurements: all launches one after another, at
LAUNCH_SECONDS each, and the kernels by `caduceus.train.estimate`, which has one time of a block: that of Mamba without
kept states, and without other ranks.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the tests are not installed
from tests.ops.tools import has_tools

if not has_tools():
    print("no triton here that brings ptxas and cuobjdump (Linux only): nothing to do")
    sys.exit(0)

from traffic import launches, of_a_layer, outside, step

from caduceus.config import CaduceusConfig
from caduceus.model.costs import streams
from caduceus.train.estimate import seconds_per_base
from launch.step_model import LAUNCH_SECONDS
from tests.ops.aot import compiling, untrained

MODELS = {
    "Ph": ({}, {}),
    "Ph, states kept": ({}, {"keep": True}),
    "Ph, a slice of a sequence": ({}, {"shared": True}),
    "PS": ({"rcps": True}, {}),
    "Mamba-2 Ph": ({"mixer": "mamba2", "d_state": 64}, {}),
}
"""Keys of the model, and how it is trained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131_072, 32_768, 8192, 2048])
    options = parser.parse_args()
    print(
        f"| model | tokens | a block, forward | backward | rest, forward | backward | {options.layers} blocks and rest "
        "| launching, ms | computing, ms |"
    )
    print("|---" * 9 + "|")
    with compiling(90, names=("none",)):
        for name, (keys, training) in MODELS.items():
            for length in options.lengths:
                print_row(options, name, keys, training, length)


def print_row(options: argparse.Namespace, name: str, keys: dict, training: dict, length: int) -> None:
    steps = []
    for blocks in (1, 2):
        config = CaduceusConfig(d_model=options.d_model, n_layer=blocks, **keys)
        model = untrained(config, **training)
        for _ in range(2):  # what ranks share is made once
            model.zero_grad()
            found = step(model, 1, length, "bf16")
        steps.append(found)
    layer = of_a_layer(*steps)
    block, rest = launches(layer), launches(outside(steps[0], layer))
    total = options.layers * sum(block) + sum(rest)
    computing = seconds_per_base(options.d_model, options.layers) * streams(config) * length
    counts = " | ".join(map(str, (*block, *rest, f"{total:,}")))
    print(
        f"| {name} | {length:,} | {counts} | {1e3 * total * LAUNCH_SECONDS:.1f} | {1e3 * computing:.1f} |", flush=True
    )


if __name__ == "__main__":
    main()
