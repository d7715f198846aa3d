"""What checkpoints cost a training step: none, written while training waits, and written behind it.

    python benchmarks/checkpointing.py [--d-model 256] [--n-layer 4] [--seq-len 256] [--every 10] [--turns 15]
        [--device cpu]

All three train the same model in one process, in turns of one save and the steps until the next; the median turn of
each counts. A save is one of the trainer's own: model and AdamW's moments to disk, sha256, marker, rename. `step waits`
is how long the loop stands still for it; `cost` is what it adds to the time of the turn.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from statistics import median

import torch

from caduceus.config import Config, config_from_dict
from caduceus.distributed.build import build_strategy
from caduceus.distributed.mesh import Ranks
from caduceus.distributed.strategy import Single
from caduceus.run_directory import RunDirectory
from caduceus.train.checkpoint import Checkpoints, Progress


@dataclass
class Turn:
    """Seconds of a turn: in all, and in the call that saves."""

    total: float
    saving: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints (10)")
    parser.add_argument("--turns", type=int, default=15, help="turns of each, of which the median counts (15)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = config_from_dict(
            {
                "model": {"d_model": options.d_model, "n_layer": options.n_layer},
                "run": {"dir": f"{directory}/run", "device": options.device},
            }
        )
        run = RunDirectory.create_or_resume(config)
        strategy = build_strategy(config, Ranks(0, 1, 1, torch.device(options.device)))
        tokens = torch.randint(7, 11, (1, options.seq_len), device=options.device)
        for _ in range(2):
            step(strategy, tokens)
        turns: dict[str, list[Turn]] = {"none": [], "waiting": [], "behind": []}
        for _ in range(options.turns):
            for mode in turns:
                turns[mode].append(take_turn(config, run, strategy, tokens, mode, options.every))
        size = sum(file.stat().st_size for file in (run.checkpoints_path / "latest").iterdir())
        parameters = sum(parameter.numel() for parameter in strategy.model.parameters())
        print(f"{parameters:,} parameters, {size / 2**20:.0f} MiB a checkpoint, one every {options.every} steps")
        print(f"{'checkpoints':12}{'ms per step':>12}{'step waits, ms':>16}{'cost':>8}")
        plain = median(turn.total for turn in turns["none"])
        for mode in turns:
            total = median(turn.total for turn in turns[mode])
            waits = 1000 * median(turn.saving for turn in turns[mode])
            print(f"{mode:12}{1000 * total / options.every:12.1f}{waits:16.1f}{total / plain - 1:8.1%}")


def take_turn(config: Config, run: RunDirectory, strategy: Single, tokens: torch.Tensor, mode: str, every: int) -> Turn:
    """Save, and train `every` steps."""
    config.checkpoint.async_ = mode == "behind"
    checkpoints = Checkpoints(config.checkpoint, run, strategy)
    started = time.perf_counter()
    if mode != "none":
        checkpoints.save(Progress(step=1, tokens=0, loader={"samples_consumed": 0}))
    saved = time.perf_counter()
    for _ in range(every):
        step(strategy, tokens)
    checkpoints.wait()
    return Turn(time.perf_counter() - started, saved - started)


def step(strategy: Single, tokens: torch.Tensor) -> None:
    strategy.backward(strategy.model(tokens, labels=tokens).loss)
    strategy.clip(1.0).item()
    strategy.step(lr=1e-4)


if __name__ == "__main__":
    main()
