"""What a step takes outside of its forward and backward passes, here and in other checkouts, on two ranks of a CPU.

    python benchmarks/step_outside.py [CHECKOUT ...] [--tokens 16384] [--d-model 128] [--layers 2] [--steps 12]
        [--rounds 3]

Two ranks train with DDP over gloo. Each has one batch of random bases, which is already there: no reading is timed. The
step is the trainer's `training_step` without the forward and backward passes, and so without the exchange of gradients.
Checkouts run in turns, each in processes of its own. For each step it takes the process's processor time and the time
by the clock, and of these the median over all steps except the first two of a run. The table has the medians over runs,
of rank 0.
"""

import argparse
import datetime
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from machine import processor

HERE = Path(__file__).resolve().parents[1]
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="*", metavar="CHECKOUT")
    for name, default in (("tokens", 16_384), ("d-model", 128), ("layers", 2), ("steps", 12), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(take_steps(options)))
        return
    checkouts = [*(path.resolve() for path in options.checkouts), HERE]
    runs: dict[Path, list[list[float]]] = {path: [] for path in checkouts}
    for _, path in itertools.product(range(options.rounds), checkouts):
        runs[path].append(run(path, options))
    print(f"{datetime.date.today()} · {processor()} · load {os.getloadavg()[0]:.1f} · two ranks\n")
    print("| checkout | processor ms outside | clock ms outside | processor ms, whole step | clock ms, whole step |")
    print("|---|---|---|---|---|")
    for path in checkouts:
        middle = [statistics.median(column) for column in zip(*runs[path], strict=True)]
        print(f"| {'this' if path == HERE else path.name} | {' | '.join(f'{1000 * value:.1f}' for value in middle)} |")


def run(checkout: Path, options: argparse.Namespace) -> list[float]:
    """Medians of rank 0: seconds of processors and of the clock outside of passes, and of the whole step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(checkout), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--rank"]
    ranks = []
    with tempfile.TemporaryDirectory() as directory:
        for rank in "01":
            environment |= {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
            places = {"env": environment, "cwd": directory}
            ranks.append(subprocess.Popen([*command, rank], **places, stdout=subprocess.PIPE, text=True))
        told = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        sys.exit(f"{checkout}: a rank failed")
    return json.loads(told[0].splitlines()[-1])


def take_steps(options: argparse.Namespace) -> list[float]:
    import caduceus  # isort: skip: before torch
    import torch

    from caduceus.config import config_from_dict
    from caduceus.data.batch import Batch
    from caduceus.distributed.build import build_strategy
    from caduceus.distributed.rendezvous import joined
    from caduceus.train.optimizer import build_optimizer
    from caduceus.train.step import training_step

    assert Path(caduceus.__file__).is_relative_to(os.environ["PYTHONPATH"])
    config = config_from_dict(
        {
            "model": {"d_model": options.d_model, "n_layer": options.layers},
            "data": {"path": ".", "seq_len": options.tokens},
            "train": {"micro_batch": 1, "global_batch": 2},
            "parallel": {"strategy": "ddp"},
            "run": {"dir": "run", "name": "steps", "device": "cpu"},
        }
    )
    with joined(config) as ranks:
        strategy = build_strategy(config, ranks, build_optimizer)
        ids = torch.randint(7, 11, (1, options.tokens), generator=torch.Generator().manual_seed(ranks.rank))
        batch = Batch(ids, torch.where(ids == 7, ids, -100), None, torch.tensor([ranks.rank])).to("cpu")
        loader = SimpleNamespace(
            **{"per_step": 1, "global_batch": 2, "samples_consumed": 0, "substituted": 0, "species": ("random",)},
            state=lambda: {"fingerprint": "", "seed": 0, "samples_consumed": 0},
            epochs=dict,
        )
        progress = first_progress(config, loader)
        inside = [0.0, 0.0]
        strategy.model.forward = taken_off(strategy.model.forward, inside)
        strategy.backward = taken_off(strategy.backward, inside)
        rows, handed = [], handed_over()
        for _ in range(options.steps):
            inside[:] = 0.0, 0.0
            before = now()
            training_step(config, strategy, loader, itertools.repeat(batch), progress, **handed)
            whole = [after - start for after, start in zip(now(), before, strict=True)]
            rows.append([*(total - own for total, own in zip(whole, inside, strict=True)), *whole])
    return [statistics.median(column) for column in zip(*rows[WARM_UP:], strict=True)]


def first_progress(config, loader):
    try:
        from caduceus.train.progress import Progress
    except ImportError:  # where it was before
        from caduceus.train.checkpointing import Progress
    return Progress(step=0, tokens=0, loader=loader.state(), warmup_steps=10)


def handed_over() -> dict:
    try:
        from caduceus.train.handover import Handover
    except ImportError:  # where a step left nothing to the next
        return {}
    return {"handover": Handover()}


def now() -> tuple[float, float]:
    """Seconds of all of this process's threads, and of the clock."""
    return time.process_time(), time.perf_counter()


def taken_off(function, total: list[float]):
    def timed(*arguments, **options):
        before = now()
        result = function(*arguments, **options)
        for place, (after, start) in enumerate(zip(now(), before, strict=True)):
            total[place] += after - start
        return result

    return timed


if __name__ == "__main__":
    main()
