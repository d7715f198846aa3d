"""Bases and seconds to a fixed validation loss, by recipe; benchmarks/board.md has the results.

    python benchmarks/board.py SHARDS RECIPE [--target 1.27] [--steps 400] [--seeds 3] [key.path=value …]

A recipe is the demo's model and data with other keys of `train.`. All recipes take the same number of bases per step. A
run takes `--steps` steps and validates every 20th of them. It counts to the first validation at or below the target.
"""

import argparse
import statistics
from tempfile import TemporaryDirectory

from caduceus.config import load_config
from caduceus.run.directory import RunDirectory
from caduceus.train.trainer import train

RECIPES = {
    "published": ["train.lr=8e-3"],
    "half the rate": ["train.lr=4e-3"],
    "twice the rate": ["train.lr=1.6e-2"],
    "wsd": ["train.lr=8e-3", "train.schedule=wsd"],
    "muon": ["train.lr=8e-3", "train.optimizer=muon"],
    "muon and wsd": ["train.lr=8e-3", "train.optimizer=muon", "train.schedule=wsd"],
    "spans": ["train.lr=8e-3", "data.mask_span=4"],
}
"""Beside the demo's keys; the published one is AdamW under cosine with a tenth of warm-up."""
VALIDATIONS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards")
    parser.add_argument("recipe", choices=RECIPES, nargs="?", help="all, if left out")
    parser.add_argument("--target", type=float, default=1.27)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    options, overrides = parser.parse_known_args()
    print("| recipe | bases to the target, by seed | seconds to it | loss at the end, by seed | mean |")
    print("|---|---|---|---|---:|")
    for recipe in [options.recipe] if options.recipe else RECIPES:
        runs = [run(options, recipe, seed, overrides) for seed in range(options.seeds)]
        bases = ", ".join("-" if found is None else f"{found[0] / 1e6:.2f}M" for found, _ in runs)
        seconds = ", ".join("-" if found is None else f"{found[1]:.0f}" for found, _ in runs)
        losses = [loss for _, loss in runs]
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {recipe} | {bases} | {seconds} | {shown} | {statistics.fmean(losses):.4f} |", flush=True)


def run(
    options: argparse.Namespace, recipe: str, seed: int, overrides: list[str]
) -> tuple[tuple[int, float] | None, float]:
    """(bases, seconds in steps) to the target, None where it was not reached; and the loss at the end."""
    with TemporaryDirectory() as folder:
        keys = [
            f"data.path={options.shards}",
            f"run.dir={folder}/run",
            f"train.seed={seed}",
            "monitor.report=false",
            "monitor.windows=0",
        ]
        keys += [f"train.steps={options.steps}", f"valid.every={max(1, options.steps // VALIDATIONS)}"]
        keys += [f"checkpoint.every={options.steps}", "wandb.mode=disabled"]
        config = load_config("demo", [*keys, *RECIPES[recipe], *overrides])
        train(config)
        rows = RunDirectory.open(config.run.dir).metrics()
    reached, bases, seconds, loss = None, 0, 0.0, float("nan")
    for row in rows:
        if "seconds" in row:
            bases, seconds = row["tokens"], seconds + row["seconds"]
        loss = row.get("valid_loss", loss)
        if reached is None and row.get("valid_loss", float("inf")) <= options.target:
            reached = bases, seconds
    return reached, loss


if __name__ == "__main__":
    main()
