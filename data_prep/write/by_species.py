"""Species made apart from each other, each in a folder of its own: by tasks that run at once, perhaps on several nodes.

Which tasks make which species, and which shards of one, decides no byte, and may be another when a command goes on.
"""

from contextlib import ExitStack
from pathlib import Path

from caduceus.errors import UserError
from data_prep.plan.species import SpeciesRequest
from data_prep.progress import Progress
from data_prep.workers import Workers
from data_prep.write.directory import is_whole, locked
from data_prep.write.kept_plan import keep_plan, kept_plan
from data_prep.write.shard_writer import shard_tasks, write_shard
from data_prep.write.sharding import SpeciesWork, open_species, plan_species_of, require_space, write_species

_AT_ONCE = 64
"""Species whose plans are held, and whose folders are locked, at a time."""


def make_species(requests: list[SpeciesRequest], folder: Path, workers: int) -> None:
    """Shard species into `folder`, without a manifest of them; what earlier tasks finished is kept as it is."""
    with Workers(workers) as pool:
        for first in range(0, len(requests), _AT_ONCE):
            unfinished = _planned(requests[first : first + _AT_ONCE], folder, pool)
            with ExitStack() as locks, pool.aborted_on_error():  # the processes end before the locks are gone
                for work in unfinished:
                    locks.enter_context(locked(work.directory.path))
                write_species(unfinished, pool)


def plan_shares(request: SpeciesRequest, folder: Path, workers: int) -> None:
    """Check a genome, plan its species and keep the plan, for tasks that write a share of the shards each."""
    with Workers(workers) as pool:
        for work in _planned([request], folder, pool):
            assert work.plan is not None, "it has just been planned"
            with locked(work.directory.path):
                work.directory.begin()
                keep_plan(work.directory.path, work.plan, work.directory.identity)


def write_share(request: SpeciesRequest, folder: Path, share: int, shares: int, workers: int) -> None:
    """Write every `shares`-th of a planned species' shards, from number `share` on, but those that are there.

    `make_species` makes the species whole when all shares are done, and writes what should be missing.
    """
    with Workers(workers) as pool, pool.aborted_on_error():
        (work,) = open_species([request], folder, pool)
        directory = work.directory
        if directory.finished():
            return
        plan = kept_plan(directory.path, request, directory.identity, is_there=True)
        if plan is None:
            raise UserError(
                f"{directory.path}: has no plan of these options; run the command that submitted this again"
            )
        mine = {task.path.name: task for task in shard_tasks(plan, directory.path)[share::shares]}
        done = {row["name"] for row in directory.begun() if row["name"] in mine and is_whole(directory.path, row)}
        tasks = [task for name, task in mine.items() if name not in done]
        label = f"writing shards of {request.name}, share {share + 1} of {shares}"
        with Progress(label, sum(task.size for task in tasks), "B") as progress:
            for _, shard in pool.run(write_shard, tasks):
                directory.record(shard, share)
                progress.add(shard["bytes"])


def _planned(requests: list[SpeciesRequest], folder: Path, pool: Workers) -> list[SpeciesWork]:
    """Those of the species that are not finished, each with its plan; there is room for them."""
    species = open_species(requests, folder, pool)
    unfinished = [work for work in species if not work.directory.finished()]
    for work in unfinished:
        work.plan = kept_plan(work.directory.path, work.request, work.directory.identity)
    plan_species_of([work for work in unfinished if work.plan is None], species, pool)
    require_space(folder, unfinished)
    return unfinished
