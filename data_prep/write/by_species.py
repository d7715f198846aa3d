"""Makes species separately, each in its own folder, in tasks that may run at the same time and on several nodes.

Which task makes which species or shards changes no byte, and may differ when a command goes on.
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
"""Number of species whose plans are in memory, and whose folders are locked, at a time."""


def make_species(requests: list[SpeciesRequest], folder: Path, workers: int) -> None:
    """Shard species into `folder`, without a manifest; what earlier tasks finished is kept."""
    with Workers(workers) as pool:
        for first in range(0, len(requests), _AT_ONCE):
            unfinished = _planned(requests[first : first + _AT_ONCE], folder, pool)
            with ExitStack() as locks, pool.aborted_on_error():  # the processes end before the locks are released
                for work in unfinished:
                    locks.enter_context(locked(work.directory.path))
                write_species(unfinished, pool)


def plan_shares(request: SpeciesRequest, folder: Path, workers: int) -> None:
    """Check a genome, plan its species and save the plan, for tasks that each write a share of the shards."""
    with Workers(workers) as pool:
        for work in _planned([request], folder, pool):
            assert work.plan is not None, "it has just been planned"
            with locked(work.directory.path):
                work.directory.begin()
                keep_plan(work.directory.path, work.plan, work.directory.identity)


def write_share(request: SpeciesRequest, folder: Path, share: int, shares: int, workers: int) -> None:
    """Write every `shares`-th shard of a planned species, from number `share` on, except those that exist.

    When all shares are done, `make_species` completes the species, and writes shards that are missing.
    """
    with Workers(workers) as pool, pool.aborted_on_error():
        (work,) = open_species([request], folder, pool)
        directory = work.directory
        if directory.finished():
            return
        plan = kept_plan(directory.path, request, directory.identity, is_there=True)
        if plan is None:
            raise UserError(
                f"{directory.path}: has no plan with these options; run the command that submitted this job again"
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
    """The species that are not finished, each with its plan. Raises `UserError` where the disk lacks room for them."""
    species = open_species(requests, folder, pool)
    unfinished = [work for work in species if not work.directory.finished()]
    for work in unfinished:
        work.plan = kept_plan(work.directory.path, work.request, work.directory.identity)
    plan_species_of([work for work in unfinished if work.plan is None], species, pool)
    require_space(folder, unfinished)
    return unfinished
