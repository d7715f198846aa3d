"""The tasks of launch/shard.py: one task for many small species, several for a large one, and one that merges all."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from caduceus.patience import exists, patient
from data_prep.check.merge import take_in
from data_prep.genome.genome import estimated_bases
from data_prep.plan.species import SpeciesRequest, identity
from data_prep.workers import available_cores
from data_prep.write.by_species import make_species, plan_shares, write_share
from data_prep.write.directory import SpeciesDirectory
from data_prep.write.shard_writer import reopen_genome
from data_prep.write.sharding import make_dataset
from data_prep.write.summary import print_summary


@dataclass(frozen=True)
class SpeciesTask:
    """Shards species, one after the other; complete ones are not made again."""

    requests: tuple[SpeciesRequest, ...]
    out: Path
    workers: int | None
    """None: as many as there are cores."""

    def __call__(self) -> None:
        make_species(list(self.requests), parts_folder(self.out), self.workers or available_cores())

    def __str__(self) -> str:
        first, last = self.requests[0].name, self.requests[-1].name
        return first if len(self.requests) == 1 else f"{first} … {last} ({len(self.requests)} species)"


@dataclass(frozen=True)
class PlanTask:
    """Checks a large genome and plans its species, whose shards several tasks then write."""

    request: SpeciesRequest
    out: Path
    workers: int | None

    def __call__(self) -> None:
        plan_shares(self.request, parts_folder(self.out), self.workers or available_cores())

    def __str__(self) -> str:
        return f"{self.request.name}: plan"


@dataclass(frozen=True)
class ShareTask:
    """Writes share number `share` of a planned species' shards."""

    request: SpeciesRequest
    out: Path
    workers: int | None
    share: int
    shares: int

    def __call__(self) -> None:
        folder = parts_folder(self.out)
        write_share(self.request, folder, self.share, self.shares, self.workers or available_cores())

    def __str__(self) -> str:
        return f"{self.request.name}: share {self.share + 1} of {self.shares}"


@dataclass(frozen=True)
class MergeTask:
    """Merges species into the dataset, and removes folders that are no longer needed."""

    missing: tuple[SpeciesRequest, ...]
    """The species that `out` does not hold yet."""
    out: Path
    requests: tuple[SpeciesRequest, ...]
    """All species of `out`, as the command may give other weights to those that it held before."""

    def __call__(self) -> None:
        parts = parts_folder(self.out)
        missing = [request for request in self.missing if not is_held(request, self.out)]
        make_species(missing, parts, available_cores())
        if missing:
            take_in(parts, self.out, [request.name for request in missing])
        print_summary(make_dataset(list(self.requests), self.out, workers=1, add=True), self.out)
        for request in self.requests:
            shutil.rmtree(parts / request.name, ignore_errors=True)
        with contextlib.suppress(OSError):  # other jobs may still make further species of this dataset
            parts.rmdir()


Task = SpeciesTask | PlanTask | ShareTask


def divided(
    requests: list[SpeciesRequest], out: Path, workers: int | None, bases: int
) -> tuple[list[Task], list[Task]]:
    """Tasks of about `bases` bases: the first ones, and those that may start when all of the first have ended.

    Small species are put together into a task, in their order; the shards of a larger one are divided between tasks.
    """
    plans: list[Task] = []
    shares: list[Task] = []
    groups: list[list[SpeciesRequest]] = []
    left = 0
    for request in requests:
        size = estimated_bases(request.fasta)
        if size > bases:
            count = -(-size // bases)
            plans.append(PlanTask(request, out, workers))
            shares += [ShareTask(request, out, workers, share, count) for share in range(count)]
            continue
        if not groups or size > left:
            groups.append([])
            left = bases
        groups[-1].append(request)
        left -= size
    return [*plans, *(SpeciesTask(tuple(group), out, workers) for group in groups)], shares


@patient
def is_held(request: SpeciesRequest, dataset: Path) -> bool:
    """Whether a dataset holds the whole species. Raises `UserError` where it holds one of another genome or other
    options.
    """
    if not exists(dataset / request.name / "species.json"):
        return False
    genome = reopen_genome(request.fasta, request.cache_dir)
    return SpeciesDirectory(dataset, identity(request, genome)).finished()


def work_folder(out: Path) -> Path:
    """The folder of the jobs' code, logs and unfinished species, inside the future dataset."""
    return out / ".jobs"


def parts_folder(out: Path) -> Path:
    """The folder of the species until all are finished."""
    return work_folder(out) / "parts"


def run_in_turn(tasks: list[Task], tell: Callable[[str], None]) -> None:
    """Run tasks in this process, one after the other."""
    for number, task in enumerate(tasks, start=1):
        tell(f"{task} ({number} of {len(tasks)})")
        task()
