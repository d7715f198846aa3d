"""Checks a dataset on disk against its manifest, byte for byte, and names what is damaged."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.data.format import INDEX_DTYPE, SPLITS, ShardIndex, index_path, load_manifest
from caduceus.errors import UserError
from caduceus.files import sha256_of
from caduceus.patience import is_file, listed, patiently
from data_prep.check.tar_index import NO_WINDOWS, TarContent, read_tar
from data_prep.plan.intervals import size, union
from data_prep.plan.line import GenomeLine
from data_prep.progress import Progress, note
from data_prep.workers import Workers
from data_prep.write.directory import read_part, shard_rows
from data_prep.write.window_tables import table_problems


@dataclass(frozen=True)
class CheckTask:
    """A shard to check: its species' directory and contigs, its split, and its row of the manifest."""

    directory: Path
    contigs: list[str]
    species: str
    split: str
    shard: dict[str, Any]


def verify(directory: Path, workers: int) -> int:
    """Check a whole dataset and print each problem. Returns the exit status: 0 where it is sound, else 1."""
    manifest = load_manifest(directory)
    problems = list(misplaced_files(directory, manifest))
    if not is_file(directory / "report.html"):
        note(f"{directory / 'report.html'} is missing; the command that made the shards writes it again")
    tasks = [
        CheckTask(directory / part["name"], [contig["name"] for contig in part["contigs"]], part["name"], split, shard)
        for part in manifest["species"]
        for split, stored in part["splits"].items()
        for shard in stored["shards"]
    ]
    tables: dict[int, np.ndarray] = {}
    with Workers(workers) as pool, Progress("verifying", sum(task.shard["bytes"] for task in tasks)) as progress:
        for number, (found, table) in pool.run(check_shard, tasks):
            problems += found
            tables[number] = table
            progress.add(tasks[number].shard["bytes"])
    if not problems:
        problems += table_problems(directory, manifest)
        problems += coverage_problems(manifest, tasks, [tables[number] for number in range(len(tasks))])
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    state = f"{len(problems)} problems" if problems else "sound"
    print(f"{directory}: {len(tasks)} shards, {sum(map(len, tables.values())):,} samples: {state}")
    return 1 if problems else 0


def misplaced_files(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Species whose own part differs from the manifest, and tars and indexes that it does not name."""
    expected = set()
    for part in manifest["species"]:
        folder = directory / part["name"]
        try:
            if read_part(folder / "species.json") != part:
                yield f"{folder / 'species.json'}: differs from the manifest"
        except UserError as error:
            yield str(error)
        tars = [folder / shard["name"] for shard in shard_rows(part)]
        expected |= {*tars, *map(index_path, tars)}
    for pattern in ("*.tar", "*.index.npz", "*/*.tar", "*/*.index.npz"):
        for path in sorted(set(listed(directory, pattern)) - expected):
            yield f"{path}: is not in the manifest; move it elsewhere"


def check_shard(task: CheckTask) -> tuple[list[str], np.ndarray]:
    """The problems of a shard, and the windows in its tar (none where it cannot be read)."""
    tar, index = task.directory / task.shard["name"], index_path(task.directory / task.shard["name"])
    missing = [f"{path}: is missing" for path in (tar, index) if not is_file(path)]
    if missing:
        return missing, NO_WINDOWS
    problems = []
    if patiently(tar.stat).st_size != task.shard["bytes"]:
        problems.append(f"{tar}: has {patiently(tar.stat).st_size:,} bytes instead of {task.shard['bytes']:,}")
    elif sha256_of(tar) != task.shard["sha256"]:
        problems.append(f"{tar}: its bytes were changed (sha256)")
    if sha256_of(index) != task.shard["index_sha256"]:
        problems.append(f"{index}: its bytes were changed, or it is the index of another tar (sha256)")
    try:
        content = read_tar(tar, {name: row for row, name in enumerate(task.contigs)})
        problems += list(content_problems(task, tar, content, ShardIndex.load(index)))
    except UserError as error:
        return [*problems, str(error)], NO_WINDOWS
    return problems, content.windows


def content_problems(task: CheckTask, tar: Path, content: TarContent, index: ShardIndex) -> Iterator[str]:
    """The differences between a tar and its index, sample by sample, and between either and the manifest's counts."""
    found, listed = content.index.samples, index.samples
    totals = {"samples": len(found), "bases": int(found["length"].sum())}
    for key, value in totals.items():
        if value != task.shard[key]:
            yield f"{tar}: holds {value:,} {key} instead of {task.shard[key]:,}"
    if len(found) != len(listed):
        yield f"{index_path(tar)}: lists {len(listed):,} samples, the tar holds {len(found):,}"
        return
    for row in np.flatnonzero(found != listed):
        fields = [name for name in INDEX_DTYPE.names if found[row][name] != listed[row][name]]
        changed = "crc32" in fields and {"crc32", "acgt", "lower"}.issuperset(fields)
        what = "its bases were changed (crc32)" if changed else f"index and tar differ in {', '.join(fields)}"
        yield f"{tar}: {content.keys[row]}: {what}"
    if not np.array_equal(content.index.runs, index.runs):
        yield f"{index_path(tar)}: its runs of other codes than ACGT differ from the tar's"
    if len(set(content.keys)) < len(content.keys):
        yield f"{tar}: a key occurs twice"
    for key, text in zip(content.keys, content.descriptions, strict=True):
        if (text["species"], text["split"]) != (task.species, task.split):
            yield f"{tar}: {key}: belongs to {text['species']}, {text['split']}"
            return


def coverage_problems(manifest: dict[str, Any], tasks: list[CheckTask], tables: list[np.ndarray]) -> Iterator[str]:
    """The splits whose stored windows, or their bases of the genome, are not as many as the plan counted."""
    for part in manifest["species"]:
        if part["report"] is None:  # a part that was rebuilt from tars has no such counts
            continue
        lengths = np.array([contig["length"] for contig in part["contigs"]], dtype=np.int64)
        for split in SPLITS:
            of_split = [
                table
                for task, table in zip(tasks, tables, strict=True)
                if (task.species, task.split) == (part["name"], split)
            ]
            stored = np.concatenate([NO_WINDOWS, *of_split])
            where = f"{part['name']} {split}"
            if (stored["end"] > lengths[stored["contig"]]).any():
                yield f"{where}: windows reach beyond their contigs"
                continue
            planned = part["report"]["splits"][split]
            windows = np.unique(stored[["contig", "start", "end"]])
            if len(windows) != planned["windows"]:
                yield f"{where}: {len(windows):,} windows instead of the {planned['windows']:,} planned"
            if len(np.unique(stored)) != len(stored):
                yield f"{where}: a window occurs twice"
            if part["plan"]["strands"] == "both" and len(stored) != 2 * len(windows):
                yield f"{where}: a window lacks a strand"
            bases = covered_bases(windows, lengths)
            if bases != planned["bases"]:
                yield f"{where}: covers {bases:,} bases instead of the {planned['bases']:,} planned"


def covered_bases(windows: np.ndarray, lengths: np.ndarray) -> int:
    """The number of bases, on contigs of these lengths, that lie in at least one window."""
    offsets = GenomeLine(lengths).starts[windows["contig"]]
    bounds = np.stack([windows["start"], windows["end"]], axis=1).astype(np.int64)
    return size(union(bounds + offsets[:, None]))
