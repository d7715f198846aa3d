"""What it costs to merge many species into one dataset, of which only the metadata is made.

    python benchmarks/merging.py [--species 250 500 1000] [--shards 100]

Each species has this many shards of 100 windows of 2^20 bases. The indexes are as in training, the tars are files of
holes, and all species have the same ones, linked. The times are processor seconds of what the last job of
launch/shard.py does with finished species: it looks at all of their indexes, moves them into the dataset, and makes
tables, report and manifest. Then the manifest is read.
"""

import argparse
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import processor
from opening import WINDOW, WINDOWS, index_of_shard, sha256

import caduceus
from caduceus.data.format import index_path, load_manifest
from caduceus.files import dump_json
from data_prep.check.merge import take_in
from data_prep.write.directory import damaged_shards, read_part, write_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--species", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--shards", type=int, default=100)
    options = parser.parse_args()
    print(f"{datetime.date.today()} · {processor()}, load {os.getloadavg()[0]:.1f}")
    print(f"Python {platform.python_version()}, numpy {np.__version__}, caduceus {caduceus.__version__}\n")
    heads = ("species", "shards", "look", "move", "tables, report, manifest", "read the manifest", "ms a species, all")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for species in options.species:
        with tempfile.TemporaryDirectory() as folder:
            parts, out = Path(folder) / "parts", Path(folder) / "out"
            names = make(parts, species, options.shards)
            spent = [
                processor_seconds(look, parts, names),
                processor_seconds(take_in, parts, out, names),
                processor_seconds(write_manifest, out),
                processor_seconds(load_manifest, out),
            ]
            cells = [f"{species:,}", f"{species * options.shards:,}", *(f"{each:.2f}" for each in spent)]
            print(f"| {' | '.join(cells)} | {1e3 * sum(spent) / species:.1f} |", flush=True)


def look(parts: Path, names: list[str]) -> None:
    for name in names:
        assert not damaged_shards(parts / name, read_part(parts / name / "species.json"))


def processor_seconds(work: Callable[..., object], *arguments: object) -> float:
    began = time.process_time()
    work(*arguments)
    return time.process_time() - began


def make(parts: Path, species: int, shards: int) -> list[str]:
    """Folders of finished species; each shard's windows lie further along the contig than those of the one before."""
    index = index_of_shard()
    size = int(index.samples["offset"][-1]) + WINDOW + 1024
    contents = []
    for _ in range(shards):
        contents.append(index.to_bytes())
        index.samples["start"] += np.uint64(WINDOWS * WINDOW)
    entry = {"bytes": size, "sha256": "0" * 64, "samples": WINDOWS, "bases": WINDOWS * WINDOW}
    names = [f"train-{shard:06d}.tar" for shard in range(shards)]
    rows = [{**entry, "name": name, "index_sha256": sha256(of)} for name, of in zip(names, contents, strict=True)]
    split = {"samples": WINDOWS * shards, "bases": WINDOWS * WINDOW * shards, "shards": rows}
    contigs = [{"name": "one", "length": WINDOWS * WINDOW * shards}]
    made = [f"species-{number:04d}" for number in range(species)]
    for number, name in enumerate(made):
        folder = parts / name
        folder.mkdir(parents=True)
        for tar, content in zip(names, contents, strict=True):
            if number:
                for path in (folder / tar, index_path(folder / tar)):
                    path.hardlink_to(parts / made[0] / path.name)
                continue
            with (folder / tar).open("wb") as file:
                file.truncate(size)
            index_path(folder / tar).write_bytes(content)
        described = {"assembly": name, "file": None, "sha256": f"{number:064d}"}
        described["plan"] = {"tail": "short", "weight": 1.0, "weight_exponent": None}
        part = {"name": name, "weight": 1.0, **described, "contigs": contigs, "splits": {"train": split}}
        (folder / "species.json").write_bytes(dump_json({**part, "report": None}))
    return made


if __name__ == "__main__":
    main()
