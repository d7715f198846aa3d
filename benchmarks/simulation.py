"""Simulated steps of some models on 1 to 64 nodes of eight H100: a table for each, and a plot of all.

    python benchmarks/simulation.py [--plot FILE.png] [--only NAME …]

The times are those of the model behind `launch/slurm.py --simulate`; none is measured.
"""

import argparse
import datetime
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import caduceus
from caduceus.config import load_config
from caduceus.distributed.network import Network
from caduceus.monitor.report.figures import colour_of, new_figure, to_png, with_legend
from launch.simulation import assumptions, efficiencies, series, table_of_steps

NODES = 64
RUNS = {
    "Ph 7.7M, 131,072 bp": ("ph-131k", []),
    "Ph 7.7M, 1,048,576 bp": ("ph-1m", []),
    "PS 7.7M, 131,072 bp": ("ps-131k", []),
    "Mamba-2 PS 311M, 8,192 bp": ("plantcad2-medium", ["data.path=shards/none"]),
    "Mamba PS 300M, 131,072 bp": (
        "ps-131k",
        ["model.d_model=1024", "model.n_layer=42", "train.global_batch=64", "train.activation_checkpointing=auto"],
    ),
}
"""By a name: preset and overrides."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    network = Network()
    print(f"{datetime.date.today()} · caduceus {caduceus.__version__}; no measurement\n")
    print(f"Assumed: {assumptions(network)}.")
    figure, axes = new_figure(
        "bases per second of a GPU, against one node (a model)", "nodes of 8 H100; dashed: with a global batch for each"
    )
    axes.set_xscale("log", base=2)
    for number, name in enumerate(options.only):
        preset, overrides = RUNS[name]
        config = load_config(preset, overrides)
        print(f"\n## {name}\n\n`{' '.join([preset, *overrides])}`")
        for grows in (False, True):
            steps = series(config, NODES, network, grows)
            batch = f"{config.train.global_batch:,} sequences"
            print(f"\nA global batch of {batch}{' for each node' if grows else ''}:\n")
            print("\n".join(table_of_steps(steps, network)), flush=True)
            label = None if grows else name
            style = {"color": colour_of(number), "linestyle": "--" if grows else "-", "label": label}
            axes.plot([nodes for nodes, _ in steps], efficiencies(steps), **style)
    if options.plot is not None:
        options.plot.write_bytes(to_png(with_legend(figure, axes)))


if __name__ == "__main__":
    main()
