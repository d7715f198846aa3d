"""What it costs ranks to open a dataset of ten trillion bases, of which only the metadata is made.

    python benchmarks/opening.py [--shards 100000] [--species 100] [--ranks 8] [--by-indexes 2000]

Shards have 100 windows of 2^20 bases, in a manifest with tables. Tars are files of holes, so that their sizes are
checked as in training. `--by-indexes` is the number of shards of a smaller dataset, which is opened by its tables and
by its indexes, as in version 1 of the format. Each rank is a process. As in training, the first rank reads the manifest
and sends it to the others; all open at once, and then locate the 10^10th sample and those that follow it. Memory is
proportional (PSS): what processes share counts once.
"""

import argparse
import datetime
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import processor

import caduceus
from caduceus.data.format import INDEX_DTYPE, RUN_DTYPE, ShardIndex, build_manifest, index_path
from caduceus.files import dump_json
from data_prep.write.window_tables import window_tables

WINDOW, WINDOWS = 1 << 20, 100
SEQ_LEN = 131072


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--species", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--by-indexes", type=int, default=2000)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(opened(options.rank)))
        return
    print(f"{datetime.date.today()} · {processor()}, load {os.getloadavg()[0]:.1f}")
    print(f"Python {platform.python_version()}, numpy {np.__version__}, caduceus {caduceus.__version__}\n")
    heads = (
        "shards",
        "bases",
        "ranks",
        "by",
        "opens a rank",
        "stats",
        "s, slowest",
        "processor s, all",
        "MiB, all",
    )
    print("| " + " | ".join((*heads, "ms, 10^10th sample", "us a sample")) + " |")
    print("|---" * (len(heads) + 2) + "|")
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few", Path(folder) / "many"
        make(few, options.by_indexes, options.species, with_indexes=True)
        for by in ("tables", "indexes"):
            if by == "indexes":
                manifest = json.loads((few / "manifest.json").read_text())
                del manifest["tables"]
                (few / "manifest.json").write_bytes(dump_json({**manifest, "version": 1}))
            show(few, options.by_indexes, 1, by)
        make(many, options.shards, options.species, with_indexes=False)
        for ranks in (1, options.ranks):
            show(many, options.shards, ranks, "tables")


def show(directory: Path, shards: int, ranks: int, by: str) -> None:
    """Open a dataset with so many ranks at once, and print a line."""
    command = [sys.executable, __file__, "--rank", str(directory)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    places = [{**os.environ, **meeting, "RANK": str(rank), "OMP_NUM_THREADS": "1"} for rank in range(ranks)]
    processes = [subprocess.Popen(command, env=place, stdout=subprocess.PIPE, text=True) for place in places]
    found = [json.loads(process.communicate()[0]) for process in processes]
    most = {key: max(rank[key] for rank in found) for key in found[0]}
    total = {key: sum(rank[key] for rank in found) for key in found[0]}
    least = min(rank["stats"] for rank in found)
    stats = f"{most['stats']:,}" if least == most["stats"] else f"{most['stats']:,} of one, {least:,} of the others"
    told = f"{shards:,} | {shards * WINDOWS * WINDOW:.1e} | {ranks} | {by} | {most['opens']:,} | {stats}"
    used = f"{most['seconds']:.2f} | {total['processor']:.2f} | {total['memory'] / 2**20:,.0f}"
    costs = f"{used} | {most['first']:.0f} | {most['sample']:.1f}"
    print(f"| {told} | {costs} |", flush=True)


def opened(directory: Path) -> dict[str, float]:
    """What one rank does at its start, and then for samples; opens are counted by an audit hook."""
    import torch

    import caduceus.data.genome as genome
    from caduceus.config import Config
    from caduceus.data.reading import SampleReader
    from caduceus.data.samples import TrainingOrder
    from caduceus.data.split_sources import open_sources, read_manifests, using_manifests
    from caduceus.distributed.ranks import Ranks

    torch.distributed.init_process_group("gloo")
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 1, torch.device("cpu"))
    config = Config()
    config.data.path, config.data.seq_len, config.data.strands = str(directory), SEQ_LEN, "both"
    opens, stats, stat = 0, 0, os.stat

    def count(event: str, arguments: tuple) -> None:
        nonlocal opens
        opens += event == "open"

    def counted(*arguments, **named):
        nonlocal stats
        stats += 1
        return stat(*arguments, **named)

    sys.addaudithook(count)
    genome.os.stat = counted
    ranks.broadcast(None)  # all have imported what they need
    before, used, began = _private(), time.process_time(), time.perf_counter()
    manifests = ranks.broadcast(read_manifests(config.data) if ranks.is_main else {})
    with using_manifests(manifests):
        split_sources = open_sources(config.data, "train")
    order = TrainingOrder(split_sources, config)
    reader = SampleReader(split_sources, config)
    seconds, used = time.perf_counter() - began, time.process_time() - used
    opens_of_start, memory = opens, _private() - before
    del reader
    began = time.process_time()
    order.locate(np.array([10**10]))
    first = time.process_time() - began
    began = time.process_time()
    for begin in range(10**10, 10**10 + 50_000, 64):
        order.locate(np.arange(begin, begin + 64))
    sample = (time.process_time() - began) / 50_000
    costs = {"seconds": seconds, "processor": used, "memory": memory, "first": 1e3 * first, "sample": 1e6 * sample}
    return {"opens": opens_of_start, "stats": stats, **costs}


def make(directory: Path, shards: int, species: int, with_indexes: bool) -> None:
    """A dataset without bases: every shard with an index of the same form, and a tar of holes."""
    index = index_of_shard()
    content = index.to_bytes()
    size = int(index.samples["offset"][-1]) + WINDOW + 1024
    entry = {"bytes": size, "sha256": "0" * 64, "index_sha256": sha256(content), "samples": WINDOWS}
    parts = []
    for number in range(species):
        name = f"species-{number:04d}"
        (directory / name).mkdir(parents=True)
        names = [
            f"train-{shard:06d}.tar" for shard in range(number * shards // species, (number + 1) * shards // species)
        ]
        for tar in names:
            with (directory / name / tar).open("wb") as file:
                file.truncate(size)
            if with_indexes:
                index_path(directory / name / tar).write_bytes(content)
        rows = [{**entry, "name": tar, "bases": WINDOWS * WINDOW} for tar in names]
        split = {"samples": WINDOWS * len(rows), "bases": WINDOWS * WINDOW * len(rows), "shards": rows}
        contigs = [{"name": "one", "length": WINDOWS * WINDOW * len(rows)}]
        described = {"assembly": name, "file": None, "sha256": f"{number:064d}", "plan": {"tail": "short"}}
        parts.append(
            {"name": name, "weight": 1.0, **described, "contigs": contigs, "splits": {"train": split}, "report": None}
        )
    _seal(directory, parts, index)


def _seal(directory: Path, parts: list[dict], index: ShardIndex) -> None:
    """Tables and manifest, with the windows of each shard further along the contig than those of the one before."""
    from unittest import mock

    def indexes(folder: Path, part: dict, entries: list[dict]):
        for number in range(len(entries)):
            samples = index.samples.copy()
            samples["start"] += np.uint64(number * WINDOWS * WINDOW)
            yield ShardIndex(samples, index.runs)

    with mock.patch("data_prep.write.window_tables._indexes", indexes):
        manifest = build_manifest(parts)
        tables = window_tables(directory, manifest)
    (directory / "manifest.json").write_bytes(dump_json(build_manifest(parts, tables)))


def index_of_shard() -> ShardIndex:
    samples = np.zeros(WINDOWS, INDEX_DTYPE)
    samples["length"] = samples["acgt"] = WINDOW
    samples["offset"] = 512 + np.arange(WINDOWS, dtype=np.uint64) * (WINDOW + 2048)
    samples["start"] = np.arange(WINDOWS, dtype=np.uint64) * WINDOW
    runs = np.zeros(10, RUN_DTYPE)
    runs["sample"], runs["start"], runs["length"] = np.arange(10) * 10, 1000, 100_000
    samples["acgt"][runs["sample"]] -= 100_000
    return ShardIndex(samples, runs)


def sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def _private() -> int:
    """Bytes of memory of this process, and of what it shares with others its part."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
