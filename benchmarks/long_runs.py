"""What it costs to start and to look at a run of a million steps, and to list ten thousand runs.

    python benchmarks/long_runs.py [--steps 1000000] [--runs 10000]

Rows are as training writes them, with random values. A checkpoint is 100 steps before the newest row, as after a kill.
Each line is a process of its own: seconds by the clock and of the processor, bytes that it read, and the most memory
that it held, minus what it held before.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from machine import processor

import caduceus
from caduceus.config import load_config
from caduceus.files import dump_json
from caduceus.monitor.wandb.history import essence, merged
from caduceus.run.checkpoints import write_marker
from caduceus.run.directory import RunDirectory

VALID_EVERY = 1000
BEHIND = 100
"""Steps between the newest checkpoint and the newest row."""
PARTS = {
    "metrics.jsonl cut back to the checkpoint": "cut",
    "the monitor's start (rows of earlier starts shown)": "monitor",
    "Weights & Biases: what it lacks, found and sent": "sender",
    "`runs.py status`, less SLURM": "status",
    "the report of all rows, once a run is complete": "report",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measured(options.part, options.directory)))
        return
    print(f"{datetime.date.today()} · {processor()}, load {os.getloadavg()[0]:.1f}")
    print(f"Python {platform.python_version()}, caduceus {caduceus.__version__}\n")
    print("| what | seconds | processor seconds | MiB read | MiB of memory |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        run = make_long_run(Path(folder) / "long", options.steps)
        for what, part in PARTS.items():
            show(what, part, run)
        make_runs(Path(folder) / "runs", options.runs)
        time.sleep(6)  # rows of runs that changed a moment ago are not remembered
        show(f"`runs.py list` of {options.runs:,} runs, the first time", "list", Path(folder) / "runs")
        show(f"`runs.py list` of {options.runs:,} runs, again", "list", Path(folder) / "runs")


def show(what: str, part: str, directory: Path) -> None:
    """Measure a part in a process of its own, and print its line."""
    command = [sys.executable, __file__, "--part", part, "--directory", str(directory)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(directory.parent / "cache")}
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)
    times = f"{found['seconds']:.3f} | {found['processor']:.3f}"
    print(f"| {what} | {times} | {found['read'] / 2**20:.1f} | {found['memory'] / 2**20:.0f} |", flush=True)


def measured(part: str, directory: Path) -> dict[str, float]:
    """Seconds, bytes read and bytes of memory of one part."""
    work = {"cut": cut, "monitor": monitor, "sender": send, "status": status, "report": report, "list": list_runs}[part]
    do = work(directory)
    memory, read, used, began = _memory(), _read(), _processor(), time.perf_counter()
    do()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "processor": _processor() - used, "read": _read() - read, "memory": _memory() - memory}


def cut(directory: Path):
    run = RunDirectory(directory)
    return lambda: run.truncate_metrics(run.checkpoints()[-1].step)


def monitor(directory: Path):
    from caduceus.monitor.rows import Monitor

    run = RunDirectory(directory)
    config = run.config()
    return lambda: Monitor(config, run, active=True)


def send(directory: Path):
    from caduceus.monitor.wandb.journal import Journal
    from caduceus.monitor.wandb.sender import Sender

    sender = Sender(RunDirectory(directory), None, 0.0, 1)
    nothing = dict.fromkeys(("log", "alert", "leave_artifacts", "finish"), lambda *arguments, **named: None)
    begun = SimpleNamespace(**nothing)
    path = directory / "wandb" / "sent.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])["step"]
    return lambda: sender._follow(begun, Journal(path, last), None, None)


def status(directory: Path):
    from launch.status import overview

    return lambda: overview(RunDirectory(directory))


def report(directory: Path):
    from caduceus.monitor.report.write import write_report

    return lambda: write_report([directory], directory / "report.html")


def list_runs(directory: Path):
    from launch import listing

    return lambda: listing.list_runs(directory)


def make_long_run(directory: Path, steps: int) -> Path:
    """A run that was killed `BEHIND` steps after its newest checkpoint, of which W&B lacks that many steps."""
    make_run(directory, steps * 2, steps - BEHIND)
    rng, at = np.random.default_rng(0), 0
    (directory / "wandb").mkdir()
    with (directory / "metrics.jsonl").open("w") as metrics, (directory / "wandb" / "sent.jsonl").open("w") as sent:
        while at < steps:
            count = min(VALID_EVERY, steps - at)
            rows = [training_row(at + number + 1, value) for number, value in enumerate(rng.random(count).tolist())]
            at += count
            best = {"best_step": VALID_EVERY, "best_valid_loss": 0.1}
            rows.append({"step": at, "valid_loss": 1 + rng.random(), "valid_loss/hg38": 1 + rng.random(), **best})
            metrics.writelines(json.dumps(row) + "\n" for row in rows)
            sent.writelines(json.dumps(essence(row)) + "\n" for row in merged(rows) if row["step"] <= steps - BEHIND)
    return directory


def make_runs(directory: Path, count: int) -> None:
    """Finished runs of a hundred rows each."""
    rng = np.random.default_rng(0)
    for number in range(count):
        run = make_run(directory / f"run-{number:05d}", 100, 100)
        rows = [training_row(step + 1, value) for step, value in enumerate(rng.random(100).tolist())]
        rows.append({"step": 100, "valid_loss": rng.random()})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ends = {"event": "start", "time": "", "job": "7", "restart": 0, "nodes": "n0", "tasks": 1, "step": 0}
        done = {"event": "end", "time": "", "job": "7", "restart": 0, "reason": "complete", "step": 100, "error": None}
        (run / "attempts.jsonl").write_text(json.dumps(ends) + "\n" + json.dumps(done) + "\n")
        entry = {"jobs": ["7"], "executor": "local", "logs": str(run / "logs"), "request": {}}
        (run / "submissions.json").write_bytes(dump_json([entry]))


_config: list[str] = []


def make_run(directory: Path, steps: int, checkpoint: int) -> Path:
    """A run directory with its configuration and a checkpoint of one small file."""
    from caduceus.config import save_config

    if not _config:
        config = load_config("demo", ["data.path=shards", "wandb.mode=disabled", "train.steps=123456789"])
        directory.mkdir(parents=True)
        save_config(config, directory / "config.yaml")
        _config.append((directory / "config.yaml").read_text())
    step = directory / "checkpoints" / f"step-{checkpoint:08d}"
    step.mkdir(parents=True)
    (directory / "logs").mkdir()
    (directory / ".lock").touch()
    (directory / "config.yaml").write_text(_config[0].replace("123456789", str(steps)))
    (step / "state.pt").write_bytes(b"0" * 100)
    write_marker(step, checkpoint, {})
    return directory


def training_row(step: int, value: float) -> dict[str, float]:
    """As the trainer writes one, at the length of its numbers."""
    laps = ("data", "forward_backward", "optimizer", "communication", "straggler")
    return {
        **{"step": step, "samples": step * 8, "tokens": step * 8 * 131072, "loss": 1 + value, "lr": 8e-3 * value},
        **{"grad_norm": value, "substituted_samples": 0, "tokens_per_second": 1e6 + value, "seconds": 1 + value},
        **{f"{lap}_seconds": value / (number + 3) for number, lap in enumerate(laps)},
        **{"peak_memory_bytes": 80 << 30, "loss/hg38": 1 + value, "skipped_steps": 0, "seconds_left": 1000},
    }


def _read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _processor() -> float:
    """Seconds of this process and of those that it has started."""
    return sum(os.times()[:4])


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
