"""python launch/evaluate.py VERB … [--nodes N] [--cluster PRESET] …: a verb of caduceus.evaluate as a job.

Takes the options of `python -m caduceus.evaluate VERB` and those of a job. The ranks of the job share the work, and
finished parts are kept: after a failure or a time limit the same command goes on.
"""

import argparse
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import submitit

from caduceus.arguments import Parser
from caduceus.errors import ONE_LINE, Kind, UserError, run_command, tell
from caduceus.evaluate.commands import PLACES, verb_arguments
from caduceus.files import append_json_line, locked, read_json_lines
from caduceus.patience import exists, is_directory
from caduceus.run.ends import ends_folder, first_cause, read_ends, recording_end
from launch import history, scheduler
from launch.capacity import slurm_complaint
from launch.job import end_on_signals, find_others
from launch.local import shown, started_here
from launch.logs import log_path
from launch.request import JobRequest, add_request_options, requested_job, sbatch_parameters
from launch.submission import SlurmExecutor, pythonpath, refuse_what_slurm_refuses, snapshot_code, submitted

_START = """
Runs a verb of caduceus-evaluate as a job, with the verb's own options. To begin:

  {caduceus-launch-evaluate} variants --model runs/ps-1k --input my.vcf --genome genome.fa --out scored.vcf --nodes 2
  {caduceus-launch-evaluate} embed --model runs/ps-1k --input genes.fa --out genes.npz --cluster local
  {caduceus-launch-evaluate} --help  # everything that a job can ask for
  {caduceus-evaluate} --help  # the verbs and their options
"""
_STARTED = "submissions.jsonl"


@dataclass(frozen=True)
class EvaluateTask:
    """One rank of an evaluation: the words of its command line, the folder in which the user typed it, and the jobs'
    folder.
    """

    words: tuple[str, ...]
    where: str
    jobs: str

    def __call__(self) -> int:
        """Run the verb, which finds its finished parts beside the output. After an error it exits with its status."""
        end_on_signals()
        os.chdir(self.where)
        job, restart = submitit.JobEnvironment(), history.this_restart()
        find_others(job, restart)
        from caduceus.train.__main__ import set_up_logging

        set_up_logging()
        logging.getLogger("submitit").propagate = False  # it prints its own messages
        try:
            with recording_end(ends_folder(Path(self.jobs), job.job_id, restart), job.global_rank):
                return run_verb(verb_arguments(self.words))
        except ONE_LINE as error:
            sys.exit(tell(error))


def main() -> int:
    """Check the command, then run it as a job or here. Returns the exit status."""
    request, words = parse_arguments()
    arguments = verb_arguments(words)
    refuse(arguments, request)
    if request.executor == "debug":
        return run_verb(arguments)
    folder = work_folder(arguments)
    task = EvaluateTask(tuple(words), str(Path.cwd()), str(folder))
    if request.executor == "local":
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        executor, job = started_here(request, folder, task)
        if shown(executor, job, "the job is ending; the same command goes on") == 0:
            return 0
        cause = first_cause(read_ends(ends_folder(folder, job.job_id, 0)))
        return 2 if cause is not None and cause.kind in (Kind.USER, Kind.NODE, Kind.RETRY) else 1
    return submit(request, folder, task, arguments.command)


def run_verb(arguments: argparse.Namespace) -> int:
    arguments.handler(arguments)
    return 0


def parse_arguments() -> tuple[JobRequest, list[str]]:
    """The options of the job, and the words of the verb's command line."""
    parser = Parser(
        called="caduceus-launch-evaluate",
        start=_START,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a suite's --tasks must not count as an abbreviation of --tasks-per-node
    )
    add_request_options(parser, default="slurm")
    known, words = parser.parse_known_args()
    if not words:
        raise UserError("VERB: say what to run, such as embed or variants; see --help")
    return requested_job(known), words


def refuse(arguments: argparse.Namespace, request: JobRequest) -> None:
    """Raise `UserError` for mistakes that would end the job as soon as it starts."""
    for name in ("chain", "spare"):
        if getattr(request, name) != getattr(JobRequest(), name):
            raise UserError(f"{name}: is for training runs; after a failure the same command goes on")
    for name in PLACES:
        path = getattr(arguments, name, None)
        if path is not None and not exists(path):
            raise UserError(f"--{name.replace('_', '-')}: {path}: no such file")


def work_folder(arguments: argparse.Namespace) -> Path:
    """The folder of the job's code and logs: beside the output, or in the current folder for a verb without output."""
    out = Path(getattr(arguments, "out", arguments.command)).absolute()
    if not is_directory(out.parent):
        raise UserError(f"--out: {out.parent}: there is no such folder")
    return out.with_name(f"{out.name}.jobs")


def submit(request: JobRequest, folder: Path, task: EvaluateTask, verb: str) -> int:
    """Submit the job to SLURM. Raises `UserError` where an earlier job with the same output waits or runs."""
    if complaint := slurm_complaint(request):
        raise UserError(complaint)
    executor = SlurmExecutor(folder / "logs", python=request.python)
    parameters = sbatch_parameters(request, f"{verb}-{folder.stem}")
    parameters["setup"].append(pythonpath(folder))
    executor.update_parameters(**parameters)
    refuse_what_slurm_refuses(executor, request)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".submitting"):
        jobs = [row["job"] for row in read_json_lines(folder / _STARTED)]
        for job in scheduler.live_jobs(jobs):
            raise UserError(f"--out: {folder.stem} is being written by job {job}; wait for it, or: scancel {job}")
        snapshot_code(folder)
        job = submitted(lambda: executor.submit(task)).job_id
        append_json_line(folder / _STARTED, {"job": job, "words": list(task.words)})
    print(f"job:           {job}\nlog:           {log_path(folder / 'logs', job)}")
    print(f"next:          squeue -j {job}   (the same command again after a failure: {shlex.join(task.words[:1])} …)")
    return 0


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
