"""Reads windows for `--homology`: the k-mers of held-out windows, and the stretches of train that are near copies of
them.
"""

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
    """Windows (contig, start, end) of a genome for a worker to read; without `held_out`, it returns their k-mers."""

    species: int
    genome: Path
    cache_dir: Path | None
    windows: list[tuple[str, int, int]]
    held_out: Path | None = None
    """A file of sorted hashes, which are too many to be sent with each task."""
    least: float = LEVELS[0]
    """The smallest share of k-mers for which a stretch is returned."""


def near_copies(species: list[tuple[SpeciesRequest, SpeciesPlan]], pool: Workers) -> list[dict[str, np.ndarray] | None]:
    """The stretches of train (`NEAR_DTYPE`) that are near copies of held-out sequence, by species and contig; None
    unless `--homology` asks.
    """
    tasks = [task for number, one in enumerate(species) for task in _tasks(number, *one, train=False)]
    with Progress("sketching held-out windows", len(tasks), "parts") as progress:
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
    """Run the tasks, and add what each finds to the list of its species."""
    with Progress("looking for near copies", len(tasks), "parts") as progress:
        for task, near in pool.run(_near, tasks):
            of_species = found[tasks[task].species]
            assert of_species is not None, "only species with --homology have tasks"
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
    assert task.held_out is not None, "a task on train has held-out hashes"
    held_out, found = np.load(task.held_out, mmap_mode="r"), []
    for contig, start, end in task.windows:
        stretches = near_stretches(np.frombuffer(genome.read(contig, start, end), np.uint8), held_out, task.least)
        stretches["start"] += start
        stretches["end"] += start
        found.append((contig, stretches))
    return found
