"""python launch/shard.py --genomes configs/genome/NAME.yaml --out DIR [--cluster PRESET] [--time …] …

Shards many genomes as job arrays, and merges them into one dataset at the end. A task has about --task-bases bases:
many small species, or a share of a large one's shards. The bytes are those of data_prep/shard_genome.py on one machine.
A command that was stopped goes on when given again; species that the dataset already holds, and shards that are
written, are not made again.

The genomes are found, and downloaded if needed, before anything is submitted, as compute nodes may have no network.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit

from caduceus.arguments import Parser
from caduceus.errors import UserError, run_command
from caduceus.files import append_json_line, locked, read_json_lines
from caduceus.patience import is_file
from data_prep.argument_types import genomes_file
from data_prep.plan.options import parse_size
from data_prep.plan.species import SpeciesRequest
from data_prep.source.species_file import read_species_file
from launch import scheduler
from launch.capacity import slurm_complaint
from launch.logs import log_path
from launch.request import JobRequest, add_request_options, requested_job, sbatch_parameters
from launch.shard_tasks import (
    MergeTask,
    PlanTask,
    Task,
    divided,
    is_held,
    parts_folder,
    run_in_turn,
    work_folder,
)
from launch.submission import SlurmExecutor, pythonpath, refuse_what_slurm_refuses, snapshot_code, submitted

_START = """
Shards many genomes as jobs of a cluster. To begin, list your genomes in a YAML file (see the
example configs/genome/multispecies.yaml), or take the example:

  {caduceus-shard} --genomes multispecies --out shards/many  # on this machine
  {caduceus-launch-shard} --genomes multispecies --out shards/many --time 04:00:00  # on a SLURM cluster
  {caduceus-launch-shard} --help  # everything that a job can ask for
"""


def main() -> int:
    """Submit the jobs, or run their tasks here. Returns the exit status."""
    arguments = parse_arguments()
    job_request = requested_job(arguments)
    if job_request.chain > 1:
        raise UserError("chain: is for training runs; after a failure the same sharding command goes on")
    requests = read_species_file(arguments.genomes, {}, arguments.cache_dir)
    requests = [replace(request, fasta=request.fasta.absolute()) for request in requests]
    refuse_what_jobs_cannot_do(requests)
    out = arguments.out.absolute()
    missing = [request for request in requests if not is_held(request, out)]
    unmade = [request for request in missing if not is_held(request, parts_folder(out))]
    bases = parse_size(arguments.task_bases, "--task-bases")
    if bases < 1:
        raise UserError(f"--task-bases: must be at least 1, got {arguments.task_bases}")
    first, then = divided(unmade, out, job_request.cpus_per_task, bases)
    end = MergeTask(tuple(missing), out, tuple(requests))
    if len(missing) < len(requests):
        print(f"{arguments.out}: holds {len(requests) - len(missing)} of {len(requests)} species already", flush=True)
    if missing and job_request.executor == "slurm":
        submit(job_request, first, then, end)
        return 0
    run_in_turn([*first, *then], lambda line: print(line, flush=True))
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
    parser.add_argument(
        "--task-bases",
        default="4G",
        metavar="SIZE",
        help="approximate bases of a task, by the sizes of files (%(default)s)",
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="folder for genomes, which all nodes can read")
    add_request_options(parser, default="cpu")
    return parser.parse_args()


def refuse_what_jobs_cannot_do(requests: list[SpeciesRequest]) -> None:
    """Raise `UserError` for the first file that a job would not find, and for options that jobs cannot honour."""
    for request in requests:
        options = request.options
        if options.homology is not None:
            raise UserError(
                f"{request.name}: homology: compares all species with each other, but each job sees only some of them; "
                "make the dataset with data_prep/shard_genome.py"
            )
        for path in (request.fasta, options.aliases, options.intervals, *options.exclude_bed):
            if path is not None and not is_file(path):
                raise UserError(f"{request.name}: {path}: no such file")


def submit(job_request: JobRequest, first: list[Task], then: list[Task], end: MergeTask) -> None:
    """Submit the tasks as arrays, and the job that merges, which starts when all of them have succeeded.

    The tasks of `then` wait only for those among `first` that plan their species.
    """
    if complaint := slurm_complaint(job_request):
        raise UserError(complaint)
    if job_request.world > 1:
        raise UserError("nodes, tasks_per_node: a task runs in one process; give it more --cpus-per-task")
    folder = work_folder(end.out)
    refuse_what_slurm_refuses(_executor(job_request, folder, f"shard-{end.out.name}"), job_request)
    folder.mkdir(parents=True, exist_ok=True)
    names = [request.name for request in end.missing]
    with locked(folder / ".submitting"):
        refuse_species_in_work(folder, names, end.out)
        snapshot_code(folder)
        jobs: list[str] = []
        arrays: list[str] = []

        def submit_after(waited_for: list[str], what: str, submit_to: Callable[[submitit.SlurmExecutor], Any]) -> None:
            after = {"dependency": ":".join(["afterok", *waited_for])} if waited_for else {}
            executor = _executor(job_request, folder, f"{what}-{end.out.name}", **after)
            done = submitted(lambda: submit_to(executor))
            new = [job.job_id for job in (done if isinstance(done, list) else [done])]
            append_json_line(folder / "submissions.jsonl", {"species": names, "jobs": new})
            jobs.extend(new)
            arrays.append(new[0].split("_")[0])

        if first:
            submit_after([], "shard", lambda executor: executor.submit_array(first))
        if then:
            plans = [job for job, task in zip(jobs, first, strict=True) if isinstance(task, PlanTask)]
            submit_after(plans, "share", lambda executor: executor.submit_array(then))
        submit_after(list(arrays), "merge", lambda executor: executor.submit(end))
    *of_tasks, merging = jobs
    told = f"jobs {of_tasks[0]} … {of_tasks[-1]}; " if of_tasks else ""
    print(f"tasks:         {len(of_tasks)} for {len(names)} species, {told}merged by job {merging}")
    print(f"log:           {log_path(folder / 'logs', merging)}")
    print(f"next:          squeue -j {','.join(arrays)}   (the same command again after a failure)")


def refuse_species_in_work(folder: Path, names: list[str], out: Path) -> None:
    """Raise `UserError` where jobs that make or merge one of the species wait or run."""
    rows = read_json_lines(folder / "submissions.jsonl")
    jobs = [job for row in rows if {*row["species"]} & {*names} for job in row["jobs"]]
    for job in scheduler.live_jobs(jobs):
        raise UserError(f"--out: {out} is being written by job {job}; wait for it, or: scancel {job.split('_')[0]}")


def _executor(job_request: JobRequest, folder: Path, name: str, **more: Any) -> submitit.SlurmExecutor:
    executor = SlurmExecutor(folder / "logs", python=job_request.python)
    parameters = sbatch_parameters(job_request, name)
    parameters["setup"].append(pythonpath(folder))
    # Otherwise a job that waits for failed jobs never ends.
    parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
    executor.update_parameters(**parameters, **more)
    return executor


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
