"""Reads windows for `--homology`: the k-mers of held-out windows, and the stretches of train that are near copies of
them.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from caduceus.data.format import SPLITS
from data_prep.plan.homology import LEVELS, near_stretches, sampled_kmers
from data_prep.plan.species import SpeciesPlan, SpeciesRequest
from data_prep.progress import Progress
from data_prep.workers import Workers
from data_prep.write.shard_writer import reopen_genome

_TRAIN = SPLITS.index("train")
_BASES_OF_A_TASK = 1 << 24
Window = tuple[str, int, int]
"""Contig, start and end."""


@dataclass(frozen=True)
class KmerTask:
    """Windows (contig, start, end) of a genome for a worker to read; without `held_out`, it returns their k-mers."""

    species: int
    genome: Path
    cache_dir: Path | None
    windows: list[Window]
    held_out: Path | None = None
    """A file of sorted hashes, which are too many to be sent with each task."""
    least: float = LEVELS[0]
    """The smallest share of k-mers for which a stretch is returned."""


@dataclass
class Found:
    """What is known about near copies in a species' train."""

    near: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """By contig, the stretches that are near copies of held-out sequence, arrays of `NEAR_DTYPE`."""
    looked_at: set[Window] = field(default_factory=set)
    """Windows that were searched."""

    def by_contig(self) -> dict[str, np.ndarray]:
        return {contig: np.concatenate(parts) for contig, parts in self.near.items()}


def sketch_held_out(species: list[tuple[SpeciesRequest, SpeciesPlan]], path: Path, pool: Workers) -> None:
    """Write the hashes of the sampled k-mers of all species' held-out windows, sorted, to a .npy file."""
    tasks: list[KmerTask] = []
    for number, (request, plan) in enumerate(species):
        tasks += _tasks(number, request, _windows(plan, train=False))
    with Progress("sketching held-out windows", len(tasks), "parts") as progress:
        sketches = [np.zeros(0, np.uint64)]
        for _, hashes in pool.run(_sketch, tasks):
            sketches.append(hashes)
            progress.add(1)
    np.save(path, np.unique(np.concatenate(sketches)))


def look_for_copies(
    species: list[tuple[SpeciesRequest, SpeciesPlan]], found: list[Found | None], held_out: Path, pool: Workers
) -> bool:
    """Search the windows of train that were not searched before. Returns whether there were any.

    `found`: the results of each species, which are extended; None for species without --homology. `held_out`: the file
    of `sketch_held_out`.
    """
    tasks: list[KmerTask] = []
    for number, ((request, plan), of_species) in enumerate(zip(species, found, strict=True)):
        if of_species is not None:
            windows = [window for window in _windows(plan, train=True) if window not in of_species.looked_at]
            of_species.looked_at.update(windows)
            tasks += _tasks(number, request, windows, held_out)
    with Progress("looking for near copies", len(tasks), "parts") as progress:
        for task, near in pool.run(_near, tasks):
            of_species = found[tasks[task].species]
            assert of_species is not None, "only species with --homology have tasks"
            for contig, stretches in near:
                of_species.near.setdefault(contig, []).append(stretches)
            progress.add(1)
    return bool(tasks)


def _windows(plan: SpeciesPlan, train: bool) -> list[Window]:
    """The windows of train, or of the other splits."""
    names = list(plan.contigs)
    rows = plan.windows[(plan.windows["split"] == _TRAIN) == train]
    return [(names[row["contig"]], int(row["start"]), int(row["end"])) for row in rows]


def _tasks(number: int, request: SpeciesRequest, windows: list[Window], held_out: Path | None = None) -> list[KmerTask]:
    """Tasks with about the same number of bases each, over windows of a species."""
    least = min(LEVELS[0], request.options.homology or 1.0)
    tasks: list[KmerTask] = []
    part: list[Window] = []
    for window in windows:
        part.append(window)
        if sum(end - start for _, start, end in part) >= _BASES_OF_A_TASK:
            tasks.append(KmerTask(number, request.fasta, request.cache_dir, part, held_out, least))
            part = []
    return [*tasks, KmerTask(number, request.fasta, request.cache_dir, part, held_out, least)] if part else tasks


def _sketch(task: KmerTask) -> np.ndarray:
    genome = reopen_genome(task.genome, task.cache_dir)
    read = (np.frombuffer(genome.read(*window), np.uint8) for window in task.windows)
    return np.unique(np.concatenate([sampled_kmers(bases)[0] for bases in read]))


def _near(task: KmerTask) -> list[tuple[str, np.ndarray]]:
    genome = reopen_genome(task.genome, task.cache_dir)
    assert task.held_out is not None, "a task on train has held-out hashes"
    held_out, found = np.load(task.held_out, mmap_mode="r"), []
    for contig, start, end in task.windows:
        stretches = near_stretches(np.frombuffer(genome.read(contig, start, end), np.uint8), held_out, task.least)
        stretches["start"] += start
        stretches["end"] += start
        found.append((contig, stretches))
    return found
