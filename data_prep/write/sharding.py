"""The work of `shard_genome.py`: open and scan the genomes, plan every species, write what is missing, seal it.

Nothing is written, not even the directory, before all genomes have been read and planned without an error.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.data.shards import SPLITS
from caduceus.errors import UserError
from data_prep.genome.genome import Genome
from data_prep.plan.composition import Scan, join_scans, scan
from data_prep.plan.species import SpeciesPlan, SpeciesRequest, identity, plan_species
from data_prep.progress import Progress
from data_prep.workers import Workers
from data_prep.write.directory import SpeciesDirectory, check_species, locked, refuse_if_locked, write_manifest
from data_prep.write.shard_writer import reopen_genome, shard_tasks, write_shard

_SCAN_BASES = 1 << 24
_SPARE_BYTES = 1 << 20


def make_dataset(requests: list[SpeciesRequest], out: Path, workers: int, add: bool = False) -> dict[str, Any]:
    """Shard species into `out` and return the dataset's manifest. What an earlier run finished is kept as it is.

    With `add`, species that `out` holds already stay beside the new ones.
    """
    check_species(out, [request.name for request in requests], add)
    refuse_if_locked(out)
    with Workers(workers) as pool:
        genomes = open_genomes(requests, pool)
        directories = [SpeciesDirectory(out, identity(*pair)) for pair in zip(requests, genomes, strict=True)]
        todo = [number for number, directory in enumerate(directories) if not directory.finished()]
        plans = plan_all([requests[i] for i in todo], [genomes[i] for i in todo], pool)
        require_space(out, [directories[i] for i in todo], plans)
        with locked(out):
            check_species(out, [request.name for request in requests], add)
            try:
                write_species([directories[i] for i in todo], plans, pool)
            except BaseException:
                pool.abort()  # before the lock is gone, and what the processes were writing with it
                raise
            for directory, request in zip(directories, requests, strict=True):
                directory.update_weight(partial(weight, request))
            return write_manifest(out)


def open_genomes(requests: list[SpeciesRequest], pool: Workers) -> list[Genome]:
    """Open and check every genome; an error names the file."""
    genomes: dict[int, Genome] = {}
    with Progress("opening genomes", len(requests), "files") as progress:
        for number, genome in pool.run(_open, [(request.fasta, request.cache_dir) for request in requests]):
            genomes[number] = genome
            progress.add(1)
    return [genomes[number] for number in range(len(requests))]


def plan_all(requests: list[SpeciesRequest], genomes: list[Genome], pool: Workers) -> list[SpeciesPlan]:
    """Scan the genomes and plan every species."""
    tasks = [task for number, genome in enumerate(genomes) for task in scan_tasks(number, requests[number], genome)]
    pieces: list[dict[str, list[Scan]]] = [{name: [] for name in genome.contigs} for genome in genomes]
    scanned: dict[int, list[Scan]] = {}
    with Progress("scanning", sum(sum(genome.contigs.values()) for genome in genomes), "bp") as progress:
        for number, scans in pool.run(_scan, tasks):
            scanned[number] = scans
            progress.add(tasks[number].bases)
    for number, task in enumerate(tasks):
        for (contig, _, _), piece in zip(task.pieces, scanned[number], strict=True):
            pieces[task.species][contig].append(piece)
    plans = []
    with Progress("planning", sum(len(genome.contigs) for genome in genomes), "contigs") as progress:
        for request, genome, parts in zip(requests, genomes, pieces, strict=True):
            try:
                plans.append(plan_species(request, genome, {name: join_scans(parts[name]) for name in genome.contigs}))
            except UserError as error:
                raise UserError(f"species {request.name} ({request.fasta}): {error}") from None
            progress.add(len(genome.contigs))
    return plans


def require_space(out: Path, directories: list["SpeciesDirectory"], plans: list[SpeciesPlan]) -> None:
    """Refuse where the file system has not the room for what is still to be written."""
    needed = 0
    for directory, plan in zip(directories, plans, strict=True):
        for shard in plan.shards:
            tar = directory.path / shard.name
            whole = tar.exists() and tar.stat().st_size == shard.size
            needed += 0 if whole else shard.size + _SPARE_BYTES
    existing = next(path for path in [out.absolute(), *out.absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room or choose another --out"
        )


def write_species(directories: list[SpeciesDirectory], plans: list[SpeciesPlan], pool: Workers) -> None:
    """Write the missing shards of every species; a species is sealed when its last shard is done."""
    tasks, owners = [], []
    shards: list[dict[str, dict[str, Any]]] = []
    for number, (directory, plan) in enumerate(zip(directories, plans, strict=True)):
        shards.append(directory.begin())
        missing = [task for task in shard_tasks(plan, directory.path) if task.path.name not in shards[number]]
        tasks += missing
        owners += [number] * len(missing)
        if not missing:
            directory.finish(species_part(plan, directory, shards[number]))
    with Progress("writing shards", sum(task.size for task in tasks), "B") as progress:
        for task_number, shard in pool.run(write_shard, tasks):
            number = owners[task_number]
            directories[number].record(shard)
            shards[number][shard["name"]] = shard
            progress.add(shard["bytes"])
            if len(shards[number]) == len(plans[number].shards):
                directories[number].finish(species_part(plans[number], directories[number], shards[number]))


def species_part(plan: SpeciesPlan, directory: SpeciesDirectory, shards: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A species' part of the manifest."""
    splits = {}
    for split in SPLITS:
        rows = [shards[shard.name] for shard in plan.shards if shard.split == split]
        if rows:
            totals = {key: sum(row[key] for row in rows) for key in ("samples", "bases")}
            splits[split] = {**totals, "shards": rows}
    described = {key: value for key, value in directory.identity.items() if key != "species"}
    return {
        "name": plan.request.name,
        "weight": weight(plan.request, plan.report),
        **described,
        "contigs": [{"name": name, "length": length} for name, length in plan.contigs.items()],
        "splits": splits,
        "report": plan.report,
    }


def weight(request: SpeciesRequest, report: dict[str, Any]) -> float:
    """The species' share in the mixture; a species without a train split counts by all it keeps."""
    exponent = request.weight_exponent
    bases = report["splits"]["train"]["bases"] or report["kept"]
    return request.weight * (1.0 if exponent is None else float(bases) ** exponent)


@dataclass(frozen=True)
class ScanTask:
    """Pieces (contig, start, end) of one genome that one worker scans in one go."""

    species: int
    genome: Path
    cache_dir: Path | None
    pieces: list[tuple[str, int, int]]

    @property
    def bases(self) -> int:
        return sum(end - start for _, start, end in self.pieces)


def scan_tasks(species: int, request: SpeciesRequest, genome: Genome) -> Iterator[ScanTask]:
    """Cut a genome into tasks of equal size: long contigs into pieces, short ones together."""
    batch: list[tuple[str, int, int]] = []
    room = _SCAN_BASES
    for contig, length in genome.contigs.items():
        start = 0
        while start < length:
            end = min(start + room, length)
            batch.append((contig, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield ScanTask(species, request.fasta, request.cache_dir, batch)
                batch, room = [], _SCAN_BASES
    if batch:
        yield ScanTask(species, request.fasta, request.cache_dir, batch)


def _open(source: tuple[Path, Path | None]) -> Genome:
    return reopen_genome(*source)


def _scan(task: ScanTask) -> list[Scan]:
    genome = reopen_genome(task.genome, task.cache_dir)
    return [scan(np.frombuffer(genome.read(contig, start, end), np.uint8), start) for contig, start, end in task.pieces]
