"""One run under every layout of ranks, against one process: numbers that must agree, and what a layout costs.

    python benchmarks/distributed_table.py [--shards DIR] [--only NAME …] [--steps 30]

A small Caduceus-PS trains on real shards (without --shards: of a random genome), with one and with two micro-batches a
step. Differences are relative, the largest over all steps. Those of gradients are over all parameters in the first
step: the norm of the difference divided by the norm of the gradient. Memory is that of tensors between steps, per rank,
for a wider model. What a rank gives to collectives in a step is that model's too: counted, and by
`caduceus.distributed.costs` (for ZeRO 3 an upper bound, without what ranks agree on). Times are those of this machine,
whose cores the ranks share. If a difference is larger than allowed, a line below the table says so, and the exit status
is 1.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from caduceus import CaduceusConfig
from caduceus.config import Config
from caduceus.distributed.costs import sent
from tests.conftest import shard, write_random_fasta
from tests.distributed.layouts import LAYOUTS, Layout, Observed, config_of, train_all

WIDE = CaduceusConfig(d_model=128, n_layer=8, rcps=True)


@dataclass
class Result:
    losses: list[float]
    observed: Observed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="a directory that data_prep/shard_genome.py made")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="layouts, beside one process (all)")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    layouts = [layout for layout in LAYOUTS if not options.only or layout.name in ("single", *options.only)]
    with tempfile.TemporaryDirectory() as directory:
        shards = options.shards or _random_shards(Path(directory))
        results: dict[tuple, Result] = {}
        for world in sorted({layout.world for layout in layouts}):
            _train(world, [layout for layout in layouts if layout.world == world], shards, directory, options, results)
        return 0 if _print(layouts, results) else 1


def _train(
    world: int, layouts: list[Layout], shards: Path, directory: str, options: argparse.Namespace, results: dict
) -> None:
    plan = list(_plan(layouts, shards, Path(directory), options.steps))
    every = train_all(
        world, [config for _, config in plan], weighed=[config.run.name for key, config in plan if key[1] == "wide"]
    )
    for (key, config), observed in zip(plan, every, strict=True):
        rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
        losses = [float(row["loss"] or "nan") for row in rows[: options.steps]]
        results[key] = Result(losses, max(observed, key=lambda rank: rank.bytes_held))


def _plan(layouts: list[Layout], shards: Path, directory: Path, steps: int) -> Iterator[tuple[tuple, Config]]:
    for layout in layouts:
        for accumulation in (1, 2):
            for precision in _precisions(layout):
                path = directory / f"{layout.name}-{accumulation}-{precision}"
                train = {"steps": steps, "precision": precision, "warmup_steps": 3}
                yield (layout.name, accumulation, precision), config_of(layout, shards, path, accumulation, **train)
        resumed = config_of(layout, shards, directory / f"{layout.name}-1-fp32", steps=steps + 1, warmup_steps=3)
        resumed.run.allow_change = ["train.steps"]
        yield (layout.name, "resumed"), resumed
        yield (layout.name, "wide"), _wide(layout, shards, directory)


def _wide(layout: Layout, shards: Path, directory: Path) -> Config:
    config = config_of(layout, shards, directory / f"{layout.name}-wide", steps=2)
    config.model = WIDE
    return config


def _print(layouts: list[Layout], results: dict[tuple, Result]) -> bool:
    """Print the table and what of it is out of bounds; returns whether nothing is."""
    print(
        "| layout | last loss, 1 and 2 micro-batches | "
        f"{' | '.join(column.name for column in COLUMNS)} | first step after s | resumed after s | MiB a rank | "
        "MB sent | by formula |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    failures = []
    for layout in layouts:
        both = [results[layout.name, accumulation, "fp32"] for accumulation in (1, 2)]
        cells = [layout.name, "  ".join(f"{result.losses[-1]:.6f}" for result in both)]
        for column in COLUMNS:
            if column.precision not in _precisions(layout):
                cells.append("-")
                continue
            difference = _largest(column, layout, results)
            cells.append(f"{difference:.1e}")
            if not difference <= column.bound:
                failures.append(f"FAILED: {layout.name}: {column.name}: {difference:.1e}, more than {column.bound:.0e}")
        cells += [
            f"{both[0].observed.seconds_to_first_step:.1f}",
            f"{results[layout.name, 'resumed'].observed.seconds_to_first_step:.1f}",
            f"{results[layout.name, 'wide'].observed.bytes_held / 2**20:.1f}",
            f"{results[layout.name, 'wide'].observed.bytes_sent / 1e6:.2f}",
            f"{sent(_wide(layout, Path('shards'), Path('runs')), layout.world).total / 1e6:.2f}",
        ]
        print("| " + " | ".join(cells) + " |")
    print("\nAt most: " + "; ".join(f"{column.name} {column.bound:.0e}" for column in COLUMNS) + ".")
    print("\n".join(failures) or f"All {len(layouts)} layouts are within that.")
    return not failures


def _precisions(layout: Layout) -> tuple[str, ...]:
    return ("fp32", "fp64") if layout.computes_fp64 else ("fp32",)


def _loss_difference(ours: Result, single: Result) -> float:
    losses, expected = torch.tensor([ours.losses, single.losses], dtype=torch.float64)
    return float(((losses - expected) / expected).abs().max())


def _first_loss_difference(ours: Result, single: Result) -> float:
    return abs(ours.losses[0] / single.losses[0] - 1)


def _gradient_difference(ours: Result, single: Result) -> float:
    gradients = ours.observed.gradients
    differences = [(gradients[name] - other).norm() / other.norm() for name, other in single.observed.gradients.items()]
    return float(torch.stack(differences).max())


@dataclass
class Column:
    """A difference between a layout and one process: in which precision, how it is taken, how large it may be."""

    name: str
    precision: str
    difference: Callable[[Result, Result], float]
    bound: float


COLUMNS = [
    Column("losses, fp32", "fp32", _loss_difference, 1e-4),
    Column("first loss", "fp32", _first_loss_difference, 1e-6),
    Column("gradients", "fp32", _gradient_difference, 1e-6),
    Column("losses, fp64", "fp64", _loss_difference, 1e-9),
]


def _largest(column: Column, layout: Layout, results: dict[tuple, Result]) -> float:
    """The largest difference of the trainings with one and with two micro-batches; NaN if any is."""
    pairs = [[results[name, n, column.precision] for name in (layout.name, "single")] for n in (1, 2)]
    return float(torch.tensor([column.difference(*pair) for pair in pairs], dtype=torch.float64).max())


def _random_shards(directory: Path) -> Path:
    write_random_fasta(directory / "genome.fa", 1, {"chr1": 30_000, "chr2": 9_000, "chr3": 10_000})
    options = ["--window", "2048", "--valid-contigs", "chr3", "--workers", "1"]
    shard(directory / "shards", "random", directory / "genome.fa", *options)
    return directory / "shards"


if __name__ == "__main__":
    sys.exit(main())
