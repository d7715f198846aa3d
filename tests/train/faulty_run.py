"""Trains like `python -m caduceus.train` on one rank, to which something happens: CONFIG [WHAT RANK STEP]."""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch

from caduceus.config import Config, load_config
from caduceus.distributed.strategy import Strategy
from caduceus.errors import run_command
from caduceus.run.leaving import leaving
from caduceus.train import loop, trainer


def hang(config: Config, strategy: Strategy) -> None:
    hanging(config).touch()
    time.sleep(3600)


def hanging(config: Config) -> Path:
    """The file that says that the run hangs."""
    return Path(config.run.dir).with_suffix(".hangs")


def die(config: Config, strategy: Strategy) -> None:
    """In the middle of the step: the forward pass is done, and the other ranks wait for gradients."""
    strategy.backward = lambda loss: os.kill(os.getpid(), signal.SIGKILL)


def nan_loss(config: Config, strategy: Strategy) -> None:
    def poison(module, inputs, output):
        handle.remove()
        return output._replace(loss_sum=output.loss_sum * float("nan"))

    handle = strategy.model.register_forward_hook(poison)


def nan_gradient(config: Config, strategy: Strategy) -> None:
    backward = strategy.backward

    def poisoned(loss: torch.Tensor) -> None:
        strategy.backward = backward
        backward(loss * float("nan"))

    strategy.backward = poisoned


def fill_disk(config: Config, strategy: Strategy) -> None:
    """Leaves no room for the next checkpoint; the one before, which is written behind the training, is finished."""
    while not (Path(config.run.dir) / "checkpoints" / "latest").exists():
        time.sleep(0.05)
    with (Path(config.run.dir).parent / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass


FAULTS = {fault.__name__: fault for fault in (hang, die, nan_loss, nan_gradient, fill_disk)}


def strike(what: str, rank: int, step: int) -> None:
    step_of_the_trainer = loop.training_step

    def faulty_step(config, strategy, loader, batches, progress, **handed):
        if strategy.ranks.rank == rank and progress.step + 1 == step:
            FAULTS[what](config, strategy)
        return step_of_the_trainer(config, strategy, loader, batches, progress, **handed)

    loop.training_step = faulty_step


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        strike(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    with leaving():
        return trainer.train(load_config(sys.argv[1]))


if __name__ == "__main__":
    run_command(main)
