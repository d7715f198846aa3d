"""What ranks read at a start, and how long they take to the first step.

    python benchmarks/starts.py [--ranks 1 2 4] [--imports | --system]

A small run resumes from its checkpoint on this many ranks of this machine, as torchrun starts them. An audit hook in
each rank counts opens, up to the end of the first step; these are the opens of Python alone. Bytes are all that the
process read (/proc/self/io). `--imports`: only what `import caduceus.train.trainer` opens, here and with the optional
packages hidden. `--system`: strace counts the system's own calls, of ranks and of the whole node: opens, and looks at
names (stat, access, readlink) or folders, also those that find nothing.
"""

import argparse
import datetime
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import processor

import caduceus

ROOT = Path(__file__).resolve().parents[1]
STEPPED = "/the-first-step-is-done"
HIDDEN = ("wandb", "matplotlib", "transformers", "deepspeed", "sklearn", "scipy", "pandas", "pyarrow", "coverage")
KINDS = ("libraries", "code", "shards", "checkpoint", "run", "others")
KEYS = {
    "model": {"d_model": 8, "n_layer": 1, "d_state": 4},
    "data": {"seq_len": 64, "workers": 0},
    "train": {"global_batch": 8, "micro_batch": 1, "warmup_steps": 1},
    "valid": {"every": 1, "samples": 4},
    "checkpoint": {"every": 1},
    "run": {"name": "starts", "device": "cpu", "allow_change": ["train.steps"]},
    "wandb": {"mode": "disabled"},
    "monitor": {"report": False, "windows": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--system", action="store_true")
    parser.add_argument("--rank", nargs=3, metavar=("SHARDS", "RUN", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--import-alone", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        shards, run, steps = options.rank
        print(json.dumps(one_rank(Path(shards), Path(run), int(steps))))
        return
    if options.import_alone is not None:
        print(json.dumps(imports(options.import_alone)))
        return
    print(f"{datetime.date.today()} · {processor()}, load {os.getloadavg()[0]:.1f}, caduceus {caduceus.__version__}\n")
    if options.system:
        show_system(options.ranks)
        return
    print("| import caduceus.train.trainer | opens | processor s |\n|---|---|---|")
    for words, hidden in (("all packages", ()), (f"without {', '.join(HIDDEN)}", HIDDEN)):
        found = json.loads(run_here("--import-alone", *hidden))
        print(f"| {words} | {found['opens']:,} | {found['processor']:.1f} |", flush=True)
    if options.imports:
        return
    print(f"\n| ranks | rank | {' | '.join(f'opens: {kind}' for kind in KINDS)} | MiB read | processor s | s |")
    print("|---" * (len(KINDS) + 5) + "|")
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        for count in options.ranks:
            show(count, shards, Path(folder) / f"run-{count}")


def show(count: int, shards: Path, run: Path) -> None:
    """Print what the ranks of a second start read, the first and the last of them."""
    start(1, shards, run, 1)
    found = start(count, shards, run, 2)
    for rank in sorted({0, count - 1}):
        told = found[rank]
        cells = [f"{told['opens'].get(kind, 0):,}" for kind in KINDS]
        cells += [f"{told['read'] / 2**20:.0f}", f"{told['processor']:.1f}", f"{told['seconds']:.1f}"]
        print(f"| {count} | {rank} | {' | '.join(cells)} |", flush=True)


def show_system(counts: list[int]) -> None:
    """Print opens and looks of each kind of file, of the first and the last rank, and of the node."""
    print(f"| ranks | of | {' | '.join(f'{kind}: opens, looks' for kind in KINDS)} | MiB read |")
    print("|---" * (len(KINDS) + 3) + "|")
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        for count in counts:
            run = Path(folder) / f"run-{count}"
            start(1, shards, run, 1)
            traces = [Path(folder) / f"trace-{count}-{rank}" for rank in range(count)]
            read = [told["read"] for told in start(count, shards, run, 2, traces)]
            found = [system_calls(trace, shards, run) for trace in traces]
            rows = {f"rank {rank}": (found[rank], read[rank]) for rank in sorted({0, count - 1})}
            rows["the node"] = sum(found, Counter()), sum(read)
            for of, (calls, size) in rows.items():
                cells = [f"{calls[kind, 'open']:,}, {calls[kind, 'look']:,}" for kind in KINDS]
                print(f"| {count} | {of} | {' | '.join(cells)} | {size / 2**20:.0f} |", flush=True)


def system_calls(trace: Path, shards: Path, run: Path) -> Counter:
    """(kind of file, "open" or "look") -> how often, up to the first step."""
    found: Counter = Counter()
    for line in trace.read_text(errors="replace").splitlines():
        call = re.search(r"(\w+)\((?:AT_FDCWD, |\d+, )?\"((?:[^\"\\]|\\.)+)\"", line)
        if call is None:
            continue
        name, path = call.groups()
        if path == STEPPED:
            break
        if name in ("open", "openat"):
            found[kind_of(path, shards, run), "open"] += 1
        elif name in ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink"):
            found[kind_of(path, shards, run), "look"] += 1
    return found


def start(count: int, shards: Path, run: Path, steps: int, traces: list[Path] | None = None) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place = {name: str(value) for name, value in place.items()}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--rank", str(shards), str(run), str(steps)]
        if traces:
            command = ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=%file", "-o", str(traces[rank]), *command]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    told = [process.communicate() for process in processes]
    for process, (printed, said) in zip(processes, told, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank ended with {process.returncode}: {printed}{said}")
    return [json.loads(printed.splitlines()[-1]) for printed, _ in told]


def one_rank(shards: Path, run: Path, steps: int) -> dict:
    """Train up to a step, and tell what was read and how long it took to the end of the first one."""
    began, opened = time.monotonic(), Counter()
    sys.addaudithook(
        lambda event, arguments: opened.update([kind_of(arguments[0], shards, run)]) if event == "open" else None
    )
    from caduceus.config import config_from_dict
    from caduceus.train import loop, trainer

    keys = {**KEYS, "data": {**KEYS["data"], "path": str(shards)}, "run": {**KEYS["run"], "dir": str(run)}}
    keys["train"] = {**KEYS["train"], "steps": steps}
    told: dict = {}
    step = loop.training_step

    def first_step(*arguments, **handed):
        row = step(*arguments, **handed)
        if not told:
            counts = Path("/proc/self/io").read_text().splitlines()
            told.update(opens=dict(opened), read=int(counts[0].split()[1]))
            os.access(STEPPED, os.F_OK)  # where a trace ends
            told.update(processor=time.process_time(), seconds=time.monotonic() - began)
        return row

    loop.training_step = first_step
    assert trainer.train(config_from_dict(keys)) == 0
    return told


def kind_of(path: object, shards: Path, run: Path) -> str:
    """Of what a file that is opened is a part."""
    if not isinstance(path, str | bytes | os.PathLike):
        return "others"
    text = os.fsdecode(path)
    if text.startswith(str(shards)):
        return "shards"
    if text.startswith(str(run / "checkpoints")):
        return "checkpoint"
    if text.startswith(str(run)):
        return "run"
    if any(text.startswith(str(ROOT / name)) for name in ("caduceus", "data_prep", "benchmarks")):
        return "code"
    return "libraries" if "site-packages" in text or text.startswith((sys.prefix, sys.base_prefix)) else "others"


def imports(hidden: list[str]) -> dict:
    """Opens and processor time of the imports of a training, with packages hidden as if they were not installed."""
    count, used = 0, time.process_time()

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        count += event == "open"

    for name in hidden:
        sys.modules[name] = None
    sys.addaudithook(hook)
    import caduceus.train.trainer  # noqa: F401

    return {"opens": count, "processor": time.process_time() - used}


def run_here(*arguments: str) -> str:
    return subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True).stdout


def make_shards(folder: Path) -> Path:
    from tests.conftest import shard, write_random_fasta

    write_random_fasta(folder / "genome.fa", 1, {"chr1": 30_000, "chr2": 9_000, "chr3": 10_000})
    options = ["--window", "2048", "--valid-contigs", "chr3", "--workers", "1"]
    shard(folder / "shards", "random", folder / "genome.fa", *options)
    return folder / "shards"


if __name__ == "__main__":
    main()
