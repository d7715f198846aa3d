"""What it costs to watch a run, at the defaults: rows, the further entries of every 100th row, and validations.

    python benchmarks/watching.py [--steps 60] [--threads 1] [key.path=value …]

It trains the preset demo on random bases, on the CPU. Steps with the further entries and steps without take turns, so
that both meet the same state of the machine; so do validations with and without the entries besides the loss. Medians
of processor time count. The shares are those of a run with `monitor.every`, `valid.every` and `monitor.machine_seconds`
as in the configuration. Processes beside the trainer, for which it never waits, are listed separately: W&B's, offline,
while rows come at the pace of the steps, and the one that draws the windows of a validation.
"""

import argparse
import datetime
import functools
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import caduceus  # isort: skip: before torch, as in training, since it sets what torch reads when imported
import numpy as np
import psutil
import torch
from machine import processor

from caduceus.config import Config, load_config, stages_of
from caduceus.distributed.ranks import Ranks
from caduceus.evaluate import heldout
from caduceus.monitor.rows import Monitor
from caduceus.monitor.windows import Drawing
from caduceus.train.machines import Machines
from caduceus.train.memory import keep_freed_memory_for
from caduceus.train.setup import Opened, Setup, open_run, set_up
from caduceus.train.step import training_step
from caduceus.train.trainer import _validate
from caduceus.train.watchdog import Watchdog

REPOSITORY = Path(__file__).resolve().parents[1]
_ROWS, _SETTLING = 200, 3.0
"""Rows that W&B's processes are watched over, from so many seconds after they have begun."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps of each kind (60)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), options.overrides)
        every, valid_every = config.monitor.every, config.valid.every
        keep_freed_memory_for(config)
        (stage,), ranks = stages_of(config), Ranks(0, 1, 1, torch.device("cpu"))
        opened = open_run(stage, ranks)
        setup = set_up(stage, ranks, opened, time.monotonic())
        plain, telling, row = _steps(setup, opened, options.steps)
        bare, detailed = _validations(setup, opened)
        of_row = _rows(config, opened, row)
        of_machines = _machines(config, ranks)
        of_wandb, of_drawing = _beside(config, opened, row, plain), _drawing(opened, setup)
        opened.run.release()
    machine_seconds = config.monitor.machine_seconds
    parts = {
        "a row (metrics.jsonl, terminal)": (of_row, of_row / plain),
        f"what every {every}th step tells of the network": (telling - plain, (telling - plain) / every / plain),
        f"what a validation tells besides the loss, every {valid_every} steps": (
            detailed - bare,
            (detailed - bare) / valid_every / plain,
        ),
        f"a row of the node, every {machine_seconds:.0f} s": (of_machines, of_machines / machine_seconds),
    }
    print(f"{datetime.date.today()} · {processor()}, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, caduceus {caduceus.__version__}")
    print(f"a step takes {1e3 * plain:.1f} ms, a validation's loss alone {1e3 * bare:.0f} ms\n")
    print("| what | ms each time | share of a step |")
    print("|---|---|---|")
    for what, (seconds, share) in parts.items():
        print(f"| {what} | {1e3 * seconds:.2f} | {share:.2%} |")
    print(f"| together | | {sum(share for _, share in parts.values()):.2%} |\n")
    print(f"beside the trainer: W&B's processes {1e3 * of_wandb:.2f} ms of a processor for each step,")
    print(f"the drawing of a validation's windows {of_drawing:.1f} s of one, at the lowest priority but 9")


def _config(folder: Path, overrides: list[str]) -> Config:
    bases = np.random.default_rng(0).choice(np.frombuffer(b"ACGTacgt", np.uint8), 1_200_000).tobytes().decode()
    (folder / "genome.fa").write_text(f">one\n{bases[:800_000]}\n>two\n{bases[800_000:]}\n")
    command = [sys.executable, "data_prep/shard_genome.py", "--fasta", str(folder / "genome.fa"), "--species", "random"]
    command += ["--out", str(folder / "shards"), "--valid-contigs", "two", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
    given = [f"data.path={folder / 'shards'}", f"run.dir={folder / 'run'}", "wandb.mode=disabled", "run.device=cpu"]
    return load_config("demo", [*given, "data.workers=0", *overrides])


def _steps(setup: Setup, opened: Opened, count: int) -> tuple[float, float, dict]:
    """Median seconds of a step that tells nothing of the network, and of one that does, and such a row."""
    batches, seconds = iter(opened.loader), {0: [], 1: []}
    for number in range(2 * count + 6):
        setup.config.monitor.every = number % 2
        began = time.process_time()
        row = training_step(setup.config, setup.strategy, opened.loader, batches, setup.progress)
        if number >= 6:
            seconds[number % 2].append(time.process_time() - began)
    return median(seconds[0]), median(seconds[1]), row


def _validations(setup: Setup, opened: Opened) -> tuple[float, float]:
    """Median seconds of a validation that has but the loss, as it was once, and of a whole one."""
    model, ranks, watchdog = setup.strategy.model, setup.strategy.ranks, Watchdog(Path(), 0, 0)

    def whole() -> None:
        _validate(setup.strategy, opened.validation, watchdog, setup.config, setup.progress)

    def bare() -> None:
        with (
            mock.patch.object(heldout, "Details"),
            mock.patch.object(model, "forward", functools.partial(model.forward, return_logits=False)),
        ):
            heldout.held_out_loss(model, opened.validation, ranks.device)

    seconds: dict[Callable, list[float]] = {bare: [], whole: []}
    for validate in (bare, whole) * 6:
        began = time.process_time()
        validate()
        seconds[validate].append(time.process_time() - began)
    return median(seconds[bare]), median(seconds[whole])


def _rows(config: Config, opened: Opened, row: dict) -> float:
    """Median seconds to record and show a row."""
    seconds = []
    with mock.patch("caduceus.monitor.rows.report_of_finished"), Monitor(config, opened.run, active=True) as monitor:
        plain = {key: value for key, value in row.items() if "/" not in key}
        for step in range(200):
            began = time.process_time()
            monitor.log_training({**plain, "step": step + 1})
            seconds.append(time.process_time() - began)
    return median(seconds)


def _machines(config: Config, ranks: Ranks) -> float:
    """Median seconds to tell of the node, as the trainer does it."""
    machines, seconds = Machines(config, ranks), []
    for step in range(200):
        began = time.process_time()
        machines.row(step)
        seconds.append(time.process_time() - began)
    return median(seconds)


def _beside(config: Config, opened: Opened, row: dict, pause: float) -> float:
    """Processor seconds of W&B's processes for each row, where one comes every `pause` seconds."""
    config.wandb.mode = "offline"
    opened.run.truncate_metrics(0)
    plain = {key: value for key, value in row.items() if "/" not in key}
    with mock.patch("caduceus.monitor.rows.report_of_finished"), Monitor(config, opened.run, active=True) as monitor:
        while not (opened.run.path / "wandb" / "status.json").exists():
            time.sleep(0.1)
        time.sleep(_SETTLING)
        began = _used(monitor.wandb.pid)
        for step in range(1, _ROWS + 1):
            monitor.log_training({**plain, "step": step})
            time.sleep(pause)
        return (_used(monitor.wandb.pid) - began) / _ROWS


def _used(pid: int) -> float:
    """Processor seconds of a process and those below it."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(of.user + of.system for of in times)


def _drawing(opened: Opened, setup: Setup) -> float:
    """Processor seconds to draw the windows of a validation."""
    _, windows = _validate(setup.strategy, opened.validation, Watchdog(Path(), 0, 0), setup.config, setup.progress)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    drawing = Drawing(opened.run.path)
    drawing.keep(1, list(windows))
    drawing.end(wait=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
