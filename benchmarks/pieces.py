"""A long sequence in pieces against one pass: the largest difference of logits and embeddings, memory and time.

    python benchmarks/pieces.py [--bases 262144] [--pieces 4096 10007 65536] [--d-model 32] [--layers 2]
        [--kinds 'Ph, mamba' 'PS, mamba' 'Ph, mamba2' 'PS, mamba2']

Weights are random. Memory is resident memory at its peak (VmHWM) in a process of its own, minus what it held before.
Differences are relative to the largest value of the one pass.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.evaluate.model import Runner
from caduceus.model.pieces import run_in_pieces

KINDS = {
    f"{name}, {mixer}": {"rcps": name == "PS", "mixer": mixer} for mixer in ("mamba", "mamba2") for name in ("Ph", "PS")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bases", type=int, default=262_144)
    parser.add_argument("--pieces", type=int, nargs="+", default=[4096, 10_007, 65_536])
    parser.add_argument("--d-model", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options, *options.one)))
        return
    print(
        f"{options.bases:,} bases, d_model {options.d_model}, {options.layers} layers, "
        f"{torch.get_num_threads()} threads\n"
    )
    print("| model | type | piece | logits differ by | embeddings differ by | peak MiB | seconds |")
    print("|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for kind, dtype in product(options.kinds, ("float64", "float32")):
            for piece in (0, *options.pieces):
                found = in_a_process(options, kind, dtype, piece, Path(folder) / "one-pass.pt")
                shown = f"{piece:,}" if piece else "one pass"
                differences = [f"{value:.1e}" if piece else "" for value in (found["logits"], found["states"])]
                cells = [kind, dtype, shown, *differences, f"{found['mib']:,.0f}", f"{found['seconds']:.1f}"]
                print(f"| {' | '.join(cells)} |", flush=True)


def in_a_process(options: argparse.Namespace, kind: str, dtype: str, piece: int, reference: Path) -> dict:
    sizes = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("bases", "d-model", "layers")]
    command = [sys.executable, __file__, *sizes, "--one", kind, dtype, str(piece), str(reference)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@torch.no_grad()
def measured(options: argparse.Namespace, kind: str, dtype: str, piece: str, reference: str) -> dict:
    torch.manual_seed(0)
    config = CaduceusConfig(d_model=options.d_model, n_layer=options.layers, headdim=16, **KINDS[kind])
    model = CaduceusForMaskedLM(config).to(getattr(torch, dtype))
    ids = torch.randint(7, 11, (1, options.bases))
    model(ids[:, :64])  # compiles
    run_in_pieces(model, ids[:, :64], 16, {})
    before, began = high_water_mark(), time.perf_counter()
    if piece == "0":
        logits, states = model(ids).logits, Runner(model, "cpu").states(ids, options.layers)
    else:
        logits = torch.empty(1, options.bases, config.padded_vocab_size, dtype=model.embedding.weight.dtype)
        states = torch.empty(2 if config.rcps else 1, 1, options.bases, options.d_model, dtype=logits.dtype)

        def keep(tensor: torch.Tensor, axis: int):
            return lambda first, part: tensor.narrow(axis, first, part.shape[axis]).copy_(part)

        run_in_pieces(model, ids, int(piece), {options.layers: keep(states, 2)}, keep(logits, 1))
    found = {"seconds": time.perf_counter() - began, "mib": (high_water_mark() - before) / 1024}
    if piece == "0":
        torch.save((logits, states), reference)
        return {**found, "logits": 0, "states": 0}
    for name, mine, other in zip(("logits", "states"), (logits, states), torch.load(reference), strict=True):
        found[name] = float((mine - other).abs().max() / other.abs().max())
    return found


def high_water_mark() -> int:
    """The most resident memory that this process has had, in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


if __name__ == "__main__":
    main()
