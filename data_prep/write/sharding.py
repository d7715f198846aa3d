"""The work of `shard_genome.py`: open and scan the genomes, plan every species, write missing shards, finish with the
manifest.

Nothing is written, and no directory is made, before all genomes have been read and planned without an error.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from caduceus.data.format import SPLITS
from caduceus.errors import UserError
from caduceus.files import fingerprint
from caduceus.patience import exists, patient, status
from data_prep.genome.genome import Genome
from data_prep.plan.composition import Scan, join_scans, scan
from data_prep.plan.species import SpeciesPlan, SpeciesRequest, identity, plan_species
from data_prep.progress import Progress
from data_prep.workers import Workers
from data_prep.write.copies import Found, look_for_copies, sketch_held_out
from data_prep.write.directory import (
    SpeciesDirectory,
    check_species,
    locked,
    parts_of,
    refuse_if_locked,
    refuse_unseen_copies,
    write_manifest,
)
from data_prep.write.shard_writer import ShardTask, reopen_genome, shard_tasks, write_shard

_SCAN_BASES = 1 << 24
_SPARE_BYTES = 1 << 20


@dataclass
class SpeciesWork:
    """A species on its way from genome to shards; `plan` is None until the genome has been scanned."""

    request: SpeciesRequest
    genome: Genome
    directory: SpeciesDirectory
    plan: SpeciesPlan | None = None


def make_dataset(requests: list[SpeciesRequest], out: Path, workers: int, add: bool = False) -> dict[str, Any]:
    """Shard species into `out` and return the dataset's manifest. What an earlier run finished is kept.

    With `add`, other species that `out` already holds stay.
    """
    names = [request.name for request in requests]
    if add and any(request.options.homology is not None for request in requests):
        raise UserError(
            "--homology: with --add, copies in the existing species would be missed; make all species in one command"
        )
    check_species(out, names, add)
    if add:
        refuse_unseen_copies(parts_of(out), names)
    refuse_if_locked(out)
    with Workers(workers) as pool:
        species = open_species(requests, out, pool)
        unfinished = [work for work in species if not work.directory.finished()]
        plan_species_of(unfinished, species, pool)
        require_space(out, unfinished)
        with locked(out), pool.aborted_on_error():  # the processes end before the lock is released
            check_species(out, names, add)
            write_species(unfinished, pool)
            for work in species:
                work.directory.update_weight(partial(weight, work.request))
            return write_manifest(out)


def open_species(requests: list[SpeciesRequest], out: Path, pool: Workers) -> list[SpeciesWork]:
    """Open and check the genome of every species; an error names the file."""
    genomes: dict[int, Genome] = {}
    with Progress("opening genomes", len(requests), "files") as progress:
        for number, genome in pool.run(_open, [(request.fasta, request.cache_dir) for request in requests]):
            genomes[number] = genome
            progress.add(1)
    identities = [identity(request, genomes[number]) for number, request in enumerate(requests)]
    together = fingerprint({"species": sorted(map(fingerprint, identities))})
    for request, one in zip(requests, identities, strict=True):
        if request.options.homology is not None:  # held-out windows of other species decide what this one leaves out
            one["plan"]["homology_over"] = together
    return [
        SpeciesWork(request, genomes[number], SpeciesDirectory(out, identities[number]))
        for number, request in enumerate(requests)
    ]


def plan_species_of(species: list[SpeciesWork], all_species: list[SpeciesWork], pool: Workers) -> None:
    """Scan the genomes and give every species its plan.

    A plan without near copies needs the held-out windows of all species, and so a first plan of each; therefore those
    of `all_species` that are finished are planned again as well.
    """
    by_homology = [work for work in species if work.request.options.homology is not None]
    wanted = all_species if by_homology else species
    scans = scan_genomes(wanted, pool)
    _plan(wanted, scans, [None] * len(wanted))
    if by_homology:
        _leave_out_copies(wanted, scans, pool)


def _leave_out_copies(species: list[SpeciesWork], scans: list[dict[str, Scan]], pool: Workers) -> None:
    """Plan species anew until every window of the plan was searched, as leaving out stretches moves other windows."""
    if not any((work.plan.windows["split"] != SPLITS.index("train")).any() for work in species):
        raise UserError("--homology: nothing is held out, so nothing is near to it; give --valid-contigs or the like")
    found = [None if work.request.options.homology is None else Found() for work in species]
    asked = [(work, of_contigs, one) for work, of_contigs, one in zip(species, scans, found, strict=True) if one]
    planned = False
    with TemporaryDirectory() as folder:
        held_out = Path(folder) / "held-out.npy"
        sketch_held_out([(work.request, work.plan) for work in species], held_out, pool)
        while look_for_copies([(work.request, work.plan) for work in species], found, held_out, pool) or not planned:
            works, of_contigs, looked = zip(*asked, strict=True)
            _plan(works, of_contigs, [one.by_contig() for one in looked])
            planned = True


def _plan(
    species: Sequence[SpeciesWork], scans: Sequence[dict[str, Scan]], near: Sequence[dict[str, np.ndarray] | None]
) -> None:
    with Progress("planning", sum(len(work.genome.contigs) for work in species), "contigs") as progress:
        for work, of_contigs, of_species in zip(species, scans, near, strict=True):
            try:
                work.plan = plan_species(work.request, work.genome, of_contigs, of_species)
            except UserError as error:
                raise UserError(f"species {work.request.name} ({work.request.fasta}): {error}") from None
            progress.add(len(work.genome.contigs))


def scan_genomes(species: list[SpeciesWork], pool: Workers) -> list[dict[str, Scan]]:
    """The scan of every contig of every species."""
    tasks = [task for number, work in enumerate(species) for task in scan_tasks(number, work.request, work.genome)]
    scanned: dict[int, list[Scan]] = {}
    with Progress("scanning", sum(task.bases for task in tasks), "bp") as progress:
        for number, scans in pool.run(_scan, tasks):
            scanned[number] = scans
            progress.add(tasks[number].bases)
    pieces: list[dict[str, list[Scan]]] = [{name: [] for name in work.genome.contigs} for work in species]
    for number, task in enumerate(tasks):
        for (contig, _, _), piece in zip(task.pieces, scanned[number], strict=True):
            pieces[task.species][contig].append(piece)
    return [{name: join_scans(parts) for name, parts in of_contigs.items()} for of_contigs in pieces]


@patient
def require_space(out: Path, species: list[SpeciesWork]) -> None:
    """Raise `UserError` where the file system lacks room for what is still to be written."""
    needed = 0
    for work in species:
        for shard in work.plan.shards:
            tar = work.directory.path / shard.name
            found = status(tar)
            whole = found is not None and found.st_size == shard.size
            needed += 0 if whole else shard.size + _SPARE_BYTES
    existing = next(path for path in [out.absolute(), *out.absolute().parents] if exists(path))
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{out}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room or choose another --out"
        )


def write_species(species: list[SpeciesWork], pool: Workers) -> None:
    """Write the missing shards of every species; a species is finished when its last shard is done."""
    tasks: list[ShardTask] = []
    owners: list[int] = []
    finished: list[dict[str, dict[str, Any]]] = []
    for number, work in enumerate(species):
        finished.append(work.directory.begin())
        missing = [
            task for task in shard_tasks(work.plan, work.directory.path) if task.path.name not in finished[number]
        ]
        tasks += missing
        owners += [number] * len(missing)
        if not missing:
            work.directory.finish(species_part(work, finished[number]))
    with Progress("writing shards", sum(task.size for task in tasks), "B") as progress:
        for task_number, shard in pool.run(write_shard, tasks):
            number = owners[task_number]
            work = species[number]
            work.directory.record(shard)
            finished[number][shard["name"]] = shard
            progress.add(shard["bytes"])
            if len(finished[number]) == len(work.plan.shards):
                work.directory.finish(species_part(work, finished[number]))


def species_part(work: SpeciesWork, shards: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A species' part of the manifest; `shards`: name -> its row."""
    splits = {}
    for split in SPLITS:
        rows = [shards[shard.name] for shard in work.plan.shards if shard.split == split]
        if rows:
            totals = {key: sum(row[key] for row in rows) for key in ("samples", "bases")}
            splits[split] = {**totals, "shards": rows}
    described = {key: value for key, value in work.directory.identity.items() if key != "species"}
    return {
        "name": work.request.name,
        "weight": weight(work.request, work.plan.report),
        **described,
        "contigs": [{"name": name, "length": length} for name, length in work.plan.contigs.items()],
        "splits": splits,
        "report": work.plan.report,
    }


def weight(request: SpeciesRequest, report: dict[str, Any]) -> float:
    """The species' share in the mixture. For a species without a train split, all its kept bases count."""
    exponent = request.weight_exponent
    bases = report["splits"]["train"]["bases"] or report["kept"]
    return request.weight * (1.0 if exponent is None else float(bases) ** exponent)


@dataclass(frozen=True)
class ScanTask:
    """Pieces (contig, start, end) of a genome that a worker scans in one task."""

    species: int
    genome: Path
    cache_dir: Path | None
    pieces: list[tuple[str, int, int]]

    @property
    def bases(self) -> int:
        return sum(end - start for _, start, end in self.pieces)


def scan_tasks(species: int, request: SpeciesRequest, genome: Genome) -> Iterator[ScanTask]:
    """Divide a genome into tasks of equal size: long contigs are cut into pieces, short ones are put together."""
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
