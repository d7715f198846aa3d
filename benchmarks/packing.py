"""What a model learns of short contigs, packed and by whole crops: held-out loss by passes over them, at equal bases.

    python benchmarks/packing.py GENOME [GENOME …] [--contigs 20] [--epochs 3] [--seeds 1]

Contigs of 5 to 30 kb, as viruses have, are cut from genomes, one from each in turn, and every ninth is held out. A step
is one sequence. All runs see as many bases, and a pass is as many as train has. One validation serves all: every
held-out base once, packed at 8,192, with the same masks.
"""

import argparse
import contextlib
import io
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from caduceus.config import Config, config_from_dict
from caduceus.data import build_validation
from caduceus.data.split_sources import open_sources
from caduceus.errors import UserError
from caduceus.evaluate.heldout import held_out_loss
from caduceus.hub import load
from caduceus.train.trainer import train
from data_prep.genome.genome import open_genome
from data_prep.shard_genome import main as shard

ARMS = [("packed", 32_768, True), ("whole crops", 32_768, False), ("packed", 8192, True), ("whole crops", 8192, False)]
"""Name, length of a sequence, whether it is packed."""
VALIDATED_AT = 8192
HELD_OUT = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("genomes", nargs="+", type=Path)
    parser.add_argument("--contigs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        bases = make_shards(shards, options.genomes, options.contigs)
        print(f"{bases:,} bases of train.\n")
        passes = "".join(f" pass {number + 1} |" for number in range(options.epochs))
        print(f"| sequences | seq_len | seen in an epoch | steps of a pass | seed | before |{passes}")
        print("|---|---:|---:|---:|---:|---:|" + "---:|" * options.epochs, flush=True)
        for arm in ARMS:
            print_runs(shards, arm, bases, options)


def print_runs(shards: Path, arm: tuple[str, int, bool], bases: int, options: argparse.Namespace) -> None:
    """Lines of the table: a run of each seed, and their mean."""
    name, seq_len, pack = arm
    steps, rows = round(bases / seq_len), []
    for seed in range(options.seeds):
        config = configured(shards, seq_len, pack)
        config.train.seed, config.train.steps = seed, steps * options.epochs
        config.checkpoint.every = config.checkpoint.keep_every = steps
        try:
            seen = int(open_sources(config.data, "train").crops.bases_of_source[0])
            rows.append(losses(config))
        except UserError as error:
            print(f"| {name} | {seq_len:,} | refused: {error} |", flush=True)
            return
        print(f"| {name} | {seq_len:,} | {seen / bases:.1%} | {steps} | {seed} |{cells(rows[-1])}", flush=True)
    if options.seeds > 1:
        means = [statistics.fmean(of_pass) for of_pass in zip(*rows, strict=True)]
        print(f"| {name} | {seq_len:,} | | {steps} | mean |{cells(means)}")


def cells(values: list[float]) -> str:
    return "".join(f" {value:.4f} |" for value in values)


def configured(shards: Path, seq_len: int, pack: bool) -> Config:
    return config_from_dict(
        {
            "model": {"d_model": 16, "n_layer": 1, "rcps": True},
            "data": {"path": str(shards), "seq_len": seq_len, "pack": pack, "workers": 0},
            "train": {"global_batch": 1, "micro_batch": 1, "lr": 4e-3},
            "valid": {"every": 0, "samples": 1 << 20},
            "run": {"device": "cpu"},
            "wandb": {"mode": "disabled"},
            "monitor": {"report": False, "windows": 0},
        }
    )


def losses(config: Config) -> list[float]:
    """Train, and return the loss on what is held out before it and after each pass."""
    batches = build_validation(configured(Path(config.data.path), VALIDATED_AT, pack=True))
    still = replace(config, train=replace(config.train, steps=1, lr=0.0, min_lr=0.0))
    found = []
    with TemporaryDirectory() as folder:
        for name, run in (("untrained", still), ("trained", config)):
            run.run.dir = f"{folder}/{name}"
            train(run)
            for checkpoint in sorted(Path(run.run.dir).glob("checkpoints/step-*")):
                found.append(held_out_loss(load(checkpoint), batches, torch.device("cpu"))["valid_loss"])
    return found


def make_shards(out: Path, genomes: list[Path], count: int) -> int:
    """Cut contigs from genomes, shard them into `out`, and return the bases of train."""
    rng = np.random.default_rng(0)
    cut = [pieces(path, rng) for path in genomes]
    held_out, bases = [], 0
    fasta = out.with_suffix(".fa")
    with fasta.open("w") as file:
        for number in range(count):
            text = next(cut[number % len(cut)])
            file.write(f">v{number}\n{text}\n")
            if number % HELD_OUT:
                bases += len(text)
            else:
                held_out.append(f"v{number}")
    words = ["--fasta", str(fasta), "--species", "short", "--contigs", "all", "--valid-contigs", *held_out]
    with contextlib.redirect_stdout(io.StringIO()):
        shard([*words, "--out", str(out), "--workers", "1"])
    return bases


def pieces(path: Path, rng: np.random.Generator) -> Iterator[str]:
    """Pieces of 5 to 30 kb that follow each other in a genome."""
    genome = open_genome(path)
    for contig, length in genome.contigs.items():
        start = 0
        while start + 30_000 <= length:
            end = start + int(rng.integers(5_000, 30_001))
            yield genome.read(contig, start, end).decode()
            start = end


if __name__ == "__main__":
    sys.exit(main())
