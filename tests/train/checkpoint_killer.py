"""Saves checkpoints without pause, is killed at random instants, and looks what is left: DIR KILLS RANKS.

Of two ranks, DDP and FSDP by turns, either or both are killed, and one that is left has to end by itself. Every
parameter of a checkpoint is its step number, so that a mixture of two checkpoints would show. All in processes forked
from one, because importing torch takes longer than everything else. Prints a line for each kill.
"""

import itertools
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from caduceus.config import Config, config_from_dict
from caduceus.distributed.build import build_strategy
from caduceus.distributed.rendezvous import joined
from caduceus.run.directory import RunDirectory
from caduceus.train.checkpointing import Checkpoints, load_checkpoint
from caduceus.train.optimizer import build_optimizer
from caduceus.train.progress import Progress

PATIENCE = 60
"""Seconds in which ranks end after another was killed."""
STRATEGIES = {1: ["single"], 2: ["ddp", "fsdp"]}


def save_for_ever(config: Config, rank: int, world: int, store: Path, first: int, started: int) -> None:
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    with joined(config) as ranks:
        strategy = build_strategy(config, ranks, build_optimizer)
        run = RunDirectory(config.run.dir)
        checkpoints = Checkpoints(config, run, strategy)
        for step in itertools.count(first):
            set_parameters(strategy.model, step)
            checkpoints.save(Progress(step=step, tokens=step, loader={"samples_consumed": step}))
            os.write(started, b".")


def set_parameters(model: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def start(config: Config, world: int, first: int) -> list[int]:
    """The processes of ranks that have each begun their second save, so that the first is complete."""
    store = Path(config.run.dir) / f"store-{first}"
    ready, started = os.pipe()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(config, rank, world, store, first, started)
            except Exception:  # where another rank was killed
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    os.close(started)
    for _ in range(2 * world):
        assert os.read(ready, 1), "no rank has lived to be killed"
    os.close(ready)
    return children


def kill(children: list[int], doomed: list[int]) -> None:
    """Kill some of the ranks, and wait for the others to end."""
    for rank in doomed:
        os.kill(children[rank], signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    for rank, child in enumerate(children):
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            assert time.monotonic() < end, f"rank {rank} lives on without ranks {doomed}"
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(ended[1]) == (-signal.SIGKILL if rank in doomed else 1)


def main() -> None:
    torch.set_num_threads(1)
    directory, kills, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    def config(strategy: str) -> Config:
        return config_from_dict(
            {
                "model": {"d_model": 8, "n_layer": 1, "d_state": 2},
                "checkpoint": {"keep": 2},
                "run": {"dir": directory, "device": "cpu"},
                "parallel": {"strategy": strategy},
                "train": {"global_batch": 2, "micro_batch": 1},
            }
        )

    run = RunDirectory.create_or_resume(config("single"))
    rng = random.Random(0)
    newest, during = 0, 0
    some = [ranks for size in range(1, world + 1) for ranks in itertools.combinations(range(world), size)]
    for number in range(kills):
        strategies = STRATEGIES[world]
        children = start(config(strategies[number % len(strategies)]), world, newest + 1)
        time.sleep(rng.uniform(0, 0.15))
        during += bool(list(run.checkpoints_path.glob(".writing-*")))  # survivors will sweep it away
        kill(children, rng.choice(some))
        assert (run.checkpoints_path / "latest" / "COMPLETE").is_file()
        checkpoint = run.newest_valid_checkpoint()
        assert all(point.damage() is None for point in run.checkpoints())
        assert checkpoint is not None and checkpoint.step > newest, (checkpoint, newest)
        newest = checkpoint.step
        with joined(config("single")) as ranks:
            strategy = build_strategy(config("single"), ranks, build_optimizer)
            assert load_checkpoint(checkpoint, strategy).tokens == newest
            assert all((parameter == newest).all() for parameter in strategy.model.parameters())
        print(newest, flush=True)
    print(f"{during} of {kills} kills while files were being written")


if __name__ == "__main__":
    main()
