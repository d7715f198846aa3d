"""What checkpoints cost training: written while it waits, and written behind it.

    python benchmarks/checkpointing.py [--d-model 256] [--n-layer 4] [--seq-len 256] [--every 10] [--turns 8]
        [--interval 500] [--device cpu]

One process trains one model in turns. A turn is one save and the `every` steps until the next one; other turns have no
save. The fastest turn of each kind counts. A save is one of the trainer's own: model and AdamW's moments to disk,
sha256, marker, rename. On a CPU there are two passes: with all processors for training, and with one left free.

- `loop waits`: how long the call that saves holds up the loop.
- `adds`: how much longer a turn with a save takes than one without, waits included.
- `of step time`: this time as a share of the steps of a turn (measured), and of `interval` steps, as a run would have
  between its checkpoints (by division; true as long as a save is over before the next one).

The second table is the processor time of the parts of one save, in all threads: the copy to host memory, for which the
loop always waits, the files, and their sha256 and fsync.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numba
import torch

from caduceus.config import Config, config_from_dict
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.run.directory import RunDirectory
from caduceus.train.checkpointing import Checkpoints
from caduceus.train.optimizer import build_optimizer
from caduceus.train.progress import Progress

MODES = ("none", "waiting", "behind")


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
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints while measuring (10)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each, of which the fastest counts (8)")
    parser.add_argument("--interval", type=int, default=500, help="steps between checkpoints of a run (500)")
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
        strategy = build_strategy(config, Ranks(0, 1, 1, torch.device(options.device)), build_optimizer)
        tokens = torch.randint(7, 11, (1, options.seq_len), device=options.device)
        parameters = sum(parameter.numel() for parameter in strategy.model.parameters())
        processors = len(os.sched_getaffinity(0))
        print(f"{parameters:,} parameters, {processors} processors, {options.device}\n")
        print(f"{'':21}{'ms per':>8}{'loop':>10}{'':>8}  of step time at one every")
        print(
            f"{'threads  checkpoints':21}{'step':>8}{'waits, ms':>10}{'adds, ms':>9}"
            f"{f'{options.every} steps':>10}{f'{options.interval} steps':>12}"
        )
        for threads in [processors, processors - 1] if options.device == "cpu" and processors > 1 else [processors]:
            torch.set_num_threads(threads)
            numba.set_num_threads(threads)
            for _ in range(2):
                step(strategy, tokens)
            turns: dict[str, list[Turn]] = {mode: [] for mode in MODES}
            for _ in range(options.turns):
                for mode in MODES:
                    turns[mode].append(take_turn(config, run, strategy, tokens, mode, options.every))
            report(threads, turns, options.every, options.interval)
        print("\nprocessor time of one checkpoint, ms")
        for part, milliseconds in parts(run, strategy).items():
            print(f"{part:44}{milliseconds:8.1f}")


def report(threads: int, turns: dict[str, list[Turn]], every: int, interval: int) -> None:
    plain = min(turn.total for turn in turns["none"])
    for mode in MODES:
        total = min(turn.total for turn in turns[mode])
        waits = 1000 * min(turn.saving for turn in turns[mode])
        line = f"{threads:7}  {mode:12}{1000 * total / every:8.1f}"
        if mode != "none":
            added = total - plain
            line += f"{waits:10.1f}{1000 * added:9.1f}{added / plain:10.1%}{added / plain * every / interval:12.2%}"
        print(line)


def parts(run: RunDirectory, strategy: Strategy, repeats: int = 10) -> dict[str, float]:
    """Least processor time of each part of a save, in milliseconds."""
    spent: dict[str, list[float]] = {}

    def measured(part: str, action: Callable) -> object:
        before = time.process_time()
        result = action()
        spent.setdefault(part, []).append(time.process_time() - before)
        return result

    for _ in range(repeats):
        directory = Path(tempfile.mkdtemp(dir=run.checkpoints_path))
        write = measured("copy to host memory", lambda: strategy.stage(None))
        measured("files (torch.distributed.checkpoint)", lambda write=write, to=directory: write(to))
        size = sum(file.stat().st_size for file in directory.iterdir())
        tensors = sum(len(part) for part in strategy.state_dict()["optimizer"]["state"].values())
        tensors += len(strategy.state_dict()["model"])
        done = measured("sha256, fsync, marker, rename", lambda to=directory: run.complete_checkpoint(to, 1, {}))
        shutil.rmtree(done.path)
    named = {"files (torch.distributed.checkpoint)": f"files ({tensors} tensors, {size / 2**20:.0f} MiB)"}
    return {named.get(part, part): 1000 * min(seconds) for part, seconds in spent.items()}


def take_turn(
    config: Config, run: RunDirectory, strategy: Strategy, tokens: torch.Tensor, mode: str, every: int
) -> Turn:
    """Save, and train `every` steps."""
    config.checkpoint.async_ = mode == "behind"
    checkpoints = Checkpoints(config, run, strategy)
    started = time.perf_counter()
    if mode != "none":
        checkpoints.save(Progress(step=1, tokens=0, loader={"samples_consumed": 0}))
    saved = time.perf_counter()
    for _ in range(every):
        step(strategy, tokens)
    checkpoints.wait()
    return Turn(time.perf_counter() - started, saved - started)


def step(strategy: Strategy, tokens: torch.Tensor) -> None:
    strategy.backward(strategy.model(tokens, labels=tokens).loss)
    strategy.clip(1.0).item()
    strategy.step(lr=1e-4)


if __name__ == "__main__":
    main()
