"""Saves checkpoints without pause in a child process, kills it at a random instant, and looks what is left: DIR KILLS.

Every parameter of a checkpoint is its step number, so that a mixture of two checkpoints would show. All in processes
forked from one, because importing torch takes longer than everything else. Prints a line for each kill.
"""

import itertools
import os
import random
import signal
import sys
import time

import torch

from caduceus.config import Config, config_from_dict
from caduceus.distributed.build import build_strategy
from caduceus.distributed.mesh import joined
from caduceus.run_directory import RunDirectory
from caduceus.train.checkpoint import Checkpoints, Progress, load_checkpoint


def save_for_ever(config: Config, first: int, started: int) -> None:
    with joined(config) as ranks:
        strategy = build_strategy(config, ranks)
        run = RunDirectory(config.run.dir)
        checkpoints = Checkpoints(config.checkpoint, run, strategy)
        for step in itertools.count(first):
            set_parameters(strategy.model, step)
            checkpoints.save(Progress(step=step, tokens=step, loader={"samples_consumed": step}))
            os.write(started, b".")


def set_parameters(model: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def main() -> None:
    torch.set_num_threads(1)
    directory, kills = sys.argv[1], int(sys.argv[2])
    config = config_from_dict(
        {
            "model": {"d_model": 8, "n_layer": 1, "d_state": 2},
            "checkpoint": {"keep": 2},
            "run": {"dir": directory, "device": "cpu"},
        }
    )
    run = RunDirectory.create_or_resume(config)
    rng = random.Random(0)
    newest, during = 0, 0
    for _ in range(kills):
        ready, started = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(config, newest + 1, started)
        for _ in range(2):
            os.read(ready, 1)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready), os.close(started)
        during += bool(list(run.checkpoints_path.glob(".writing-*")))
        assert (run.checkpoints_path / "latest" / "COMPLETE").is_file()
        checkpoint = run.newest_valid_checkpoint()
        assert all(point.damage() is None for point in run.checkpoints())
        assert checkpoint is not None and checkpoint.step > newest, (checkpoint, newest)
        newest = checkpoint.step
        with joined(config) as ranks:
            strategy = build_strategy(config, ranks)
            assert load_checkpoint(checkpoint, strategy).tokens == newest
            assert all((parameter == newest).all() for parameter in strategy.model.parameters())
        print(newest, flush=True)
    print(f"{during} of {kills} kills while files were being written")


if __name__ == "__main__":
    main()
