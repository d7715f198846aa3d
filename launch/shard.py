"""python launch/shard.py --genomes configs/genome/NAME.yaml --out DIR [--cluster PRESET] [--time …] …

Shards many genomes as a job array, one species per task, and brings them together in one dataset at the end. The bytes
are those of data_prep/shard_genome.py on one machine. A command that was stopped goes on when given again; species that
the dataset holds already are not done again.

The genomes are found, and fetched where need be, before anything is submitted: compute nodes may have no network.
"""

import argparse
import contextlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit

from caduceus.arguments import Parser
from caduceus.errors import UserError, run_command
from caduceus.files import append_json_line, locked, read_json_lines
from data_prep.argument_types import genomes_file
from data_prep.check.merge import merge
from data_prep.plan.species import SpeciesRequest, identity
from data_prep.source.species_file import read_species_file
from data_prep.workers import available_cores
from data_prep.write.directory import SpeciesDirectory
from data_prep.write.shard_writer import reopen_genome
from data_prep.write.sharding import make_dataset
from data_prep.write.summary import print_summary
from launch import scheduler
from launch.capacity import slurm_complaint
from launch.logs import log_path
from launch.request import JobRequest, add_request_options, requested_job, sbatch_parameters
from launch.submission import SlurmExecutor, pythonpath, refuse_what_slurm_refuses, snapshot_code, submitted

_START = """
Shards many genomes as jobs of a cluster, a species a job. To begin, list your genomes in a YAML file (see the
example configs/genome/multispecies.yaml), or take the example:

  {caduceus-shard} --genomes multispecies --out shards/many  # on this machine
  {caduceus-launch-shard} --genomes multispecies --out shards/many --time 04:00:00  # on a SLURM cluster
  {caduceus-launch-shard} --help  # everything that a job can ask for
"""


@dataclass(frozen=True)
class ShardTask:
    """Shards one species into a dataset of its own; what is complete is not done again."""

    request: SpeciesRequest
    out: Path
    workers: int | None
    """None: as many as there are cores."""

    def __call__(self) -> None:
        make_dataset([self.request], self.out, self.workers or available_cores())


@dataclass(frozen=True)
class MergeTask:
    """Brings the datasets of the species together, and removes what is then not needed."""

    parts: tuple[Path, ...]
    """Datasets of the species that `out` does not hold yet."""
    out: Path
    requests: tuple[SpeciesRequest, ...]
    """All species of `out`: those that it held before may have been given other weights."""

    def __call__(self) -> None:
        if self.parts:
            merge(list(self.parts), self.out, add=True)
        print_summary(make_dataset(list(self.requests), self.out, workers=1, add=True), self.out)
        parts = work_folder(self.out) / "parts"
        for request in self.requests:
            shutil.rmtree(parts / request.name, ignore_errors=True)
        with contextlib.suppress(OSError):  # where jobs make further species of this dataset
            parts.rmdir()


def main() -> int:
    """Submit the jobs, or do them here; returns the exit status."""
    arguments = parse_arguments()
    job_request = requested_job(arguments)
    if job_request.chain > 1:
        raise UserError("chain: is for training runs; after a failure the same sharding command goes on")
    requests = read_species_file(arguments.genomes, {}, arguments.cache_dir)
    requests = [replace(request, fasta=request.fasta.absolute()) for request in requests]
    refuse_missing_files(requests)
    out = arguments.out.absolute()
    parts = work_folder(out) / "parts"
    missing = [request for request in requests if not is_held(request, out)]
    tasks = [ShardTask(request, parts / request.name, job_request.cpus_per_task) for request in missing]
    end = MergeTask(tuple(task.out for task in tasks), out, tuple(requests))
    if len(missing) < len(requests):
        print(f"{arguments.out}: holds {len(requests) - len(missing)} of {len(requests)} species already", flush=True)
    if not tasks:
        end()
        return 0
    if job_request.executor == "slurm":
        submit(job_request, tasks, end)
        return 0
    for number, task in enumerate(tasks, start=1):
        print(f"{task.request.name} ({number} of {len(tasks)})", flush=True)
        task()
    end()
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        called="caduceus-launch-shard",
        start=_START,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--genomes", type=genomes_file, required=True, metavar="NAME|YAML", help="the species and how to cut them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the dataset")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="where genomes are kept, seen by all nodes")
    add_request_options(parser, default="cpu")
    return parser.parse_args()


def refuse_missing_files(requests: list[SpeciesRequest]) -> None:
    """Raise `UserError` for the first file that a job would not find."""
    for request in requests:
        options = request.options
        for path in (request.fasta, options.aliases, options.intervals, *options.exclude_bed):
            if path is not None and not Path(path).is_file():
                raise UserError(f"{request.name}: {path}: no such file")


def is_held(request: SpeciesRequest, out: Path) -> bool:
    """Whether a dataset holds a species, whole; a species of another genome or other options is a `UserError`."""
    if not (out / request.name / "species.json").exists():
        return False
    genome = reopen_genome(request.fasta, request.cache_dir)
    return SpeciesDirectory(out, identity(request, genome)).finished()


def submit(job_request: JobRequest, tasks: list[ShardTask], end: MergeTask) -> None:
    """Submit the array and, to start when all of it has succeeded, the job that merges."""
    if complaint := slurm_complaint(job_request):
        raise UserError(complaint)
    if job_request.world > 1:
        raise UserError("nodes, tasks_per_node: a species is sharded by one process; give it more --cpus-per-task")
    folder = work_folder(end.out)
    executor = _executor(job_request, folder, f"shard-{end.out.name}")
    refuse_what_slurm_refuses(executor, job_request)
    folder.mkdir(parents=True, exist_ok=True)
    names = [task.request.name for task in tasks]
    with locked(folder / ".submitting"):
        refuse_species_in_work(folder, names, end.out)
        snapshot_code(folder)
        jobs = [job.job_id for job in submitted(lambda: executor.submit_array(tasks))]
        append_json_line(folder / "submissions.jsonl", {"species": names, "jobs": jobs})
        last = _executor(job_request, folder, f"merge-{end.out.name}", dependency=f"afterok:{jobs[0].split('_')[0]}")
        merging = submitted(lambda: last.submit(end)).job_id
        append_json_line(folder / "submissions.jsonl", {"species": names, "jobs": [merging]})
    print(f"species:       {len(jobs)}, jobs {jobs[0]} … {jobs[-1]}; merged by job {merging}")
    print(f"log:           {log_path(folder / 'logs', merging)}")
    print(f"next:          squeue -j {jobs[0].split('_')[0]},{merging}   (the same command again after a failure)")


def refuse_species_in_work(folder: Path, names: list[str], out: Path) -> None:
    """Raise `UserError` where jobs that make one of the species, or merge it, wait or run."""
    rows = read_json_lines(folder / "submissions.jsonl")
    jobs = [job for row in rows if {*row["species"]} & {*names} for job in row["jobs"]]
    for job in scheduler.live_jobs(jobs):
        raise UserError(f"--out: {out} is being made by job {job}; wait for it, or: scancel {job.split('_')[0]}")


def work_folder(out: Path) -> Path:
    """Where jobs keep code, logs and the species' own datasets, beside the species of the dataset to be."""
    return out / ".jobs"


def _executor(job_request: JobRequest, folder: Path, name: str, **more: Any) -> submitit.SlurmExecutor:
    executor = SlurmExecutor(folder / "logs", python=job_request.python)
    parameters = sbatch_parameters(job_request, name)
    parameters["setup"].append(pythonpath(folder))
    # Otherwise a job that waits for others which have failed never ends.
    parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
    executor.update_parameters(**parameters, **more)
    return executor


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
