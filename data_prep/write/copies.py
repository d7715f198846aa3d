"""Reads windows for `--homology`: the k-mers of what is held out, and what of train is near to it."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from caduceus.data.format import SPLITS
from data_prep.plan.homology import LEVELS, near_stretches, sampled_kmers
from data_prep.plan.species import SpeciesPlan, SpeciesRequest
from data_prep.progress import Progress
from data_prep.workers import Workers
from data_prep.write.shard_writer import reopen_genome

_TRAIN = SPLITS.index("train")
_BASES_OF_A_TASK = 1 << 24


@dataclass(frozen=True)
class KmerTask:
    """Windows (contig, start, end) of one genome that a worker reads; without `held_out`, for their k-mers."""

    species: int
    genome: Path
    cache_dir: Path | None
    windows: list[tuple[str, int, int]]
    held_out: Path | None = None
    """A file of sorted hashes: they are too many to travel with each task."""
    least: float = LEVELS[0]
    """The share of k-mers from which a stretch is told."""


def near_copies(species: list[tuple[SpeciesRequest, SpeciesPlan]], pool: Workers) -> list[dict[str, np.ndarray] | None]:
    """By species and contig the stretches of train (`NEAR_DTYPE`) near to what is held out; None if not asked for."""
    tasks = [task for number, one in enumerate(species) for task in _tasks(number, *one, train=False)]
    with Progress("sketching what is held out", len(tasks), "parts") as progress:
        sketches = [np.zeros(0, np.uint64)]
        for _, hashes in pool.run(_sketch, tasks):
            sketches.append(hashes)
            progress.add(1)
    asked = [(number, one) for number, one in enumerate(species) if one[0].options.homology is not None]
    found: list[dict[str, list[np.ndarray]] | None] = [None] * len(species)
    for number, _ in asked:
        found[number] = {}
    with TemporaryDirectory() as folder:
        held_out = Path(folder) / "held-out.npy"
        np.save(held_out, np.unique(np.concatenate(sketches)))
        tasks = [task for number, one in asked for task in _tasks(number, *one, train=True, held_out=held_out)]
        _look(tasks, found, pool)
    return [None if one is None else {contig: np.concatenate(parts) for contig, parts in one.items()} for one in found]


def _look(tasks: list[KmerTask], found: list[dict[str, list[np.ndarray]] | None], pool: Workers) -> None:
    """Add what tasks find to the parts of their species."""
    with Progress("looking for near copies", len(tasks), "parts") as progress:
        for task, near in pool.run(_near, tasks):
            of_species = found[tasks[task].species]
            assert of_species is not None, "tasks are of species that ask"
            for contig, parts in near:
                of_species.setdefault(contig, []).append(parts)
            progress.add(1)


def _tasks(
    number: int, request: SpeciesRequest, plan: SpeciesPlan, train: bool, held_out: Path | None = None
) -> list[KmerTask]:
    """Tasks over the windows of train, or of the other splits."""
    names, least = list(plan.contigs), min(LEVELS[0], request.options.homology or 1.0)
    rows = plan.windows[(plan.windows["split"] == _TRAIN) == train]
    windows = [(names[row["contig"]], int(row["start"]), int(row["end"])) for row in rows]
    tasks: list[KmerTask] = []
    part: list[tuple[str, int, int]] = []
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
    assert task.held_out is not None, "a task of train has what is held out"
    held_out, found = np.load(task.held_out, mmap_mode="r"), []
    for contig, start, end in task.windows:
        stretches = near_stretches(np.frombuffer(genome.read(contig, start, end), np.uint8), held_out, task.least)
        stretches["start"] += start
        stretches["end"] += start
        found.append((contig, stretches))
    return found
