"""Finds mistakes before a job waits in a queue for hours."""

import contextlib
from statistics import median

from caduceus.config import Config, stages_of, within
from caduceus.data.split_sources import open_sources
from caduceus.devices import GPU
from caduceus.distributed.layout import check_layout
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from caduceus.train.estimate import estimate
from launch.capacity import slurm_complaint
from launch.request import JobRequest
from launch.scheduler import SilentError
from launch.status import live_jobs_of
from launch.terminal import runs_command


def refuse_impossible_layout(config: Config, request: JobRequest) -> None:
    """Raise `UserError` where the configuration's layout is impossible on the ranks of the request."""
    for stage in stages_of(config):
        with within(stage):
            check_layout(stage.config, request.world)
    if config.run.device == GPU and request.executor == "slurm" and not request.gpus_per_node:
        raise UserError("run.device: cuda was asked for, but the job asks for no GPUs; use --gpus-per-node")


def refuse_bad_request(config: Config, request: JobRequest) -> None:
    """Raise `UserError` for the first thing that would go wrong."""
    refuse_impossible_layout(config, request)
    if found := complaints(config, request):
        raise UserError(found[0])


def complaints(config: Config, request: JobRequest) -> list[str]:
    """The reasons why the run would fail on this machine or its SLURM, one line each."""
    found = [_data_complaint(config), _evaluations_complaint(config), _time_complaint(config, request)]
    if request.executor == "slurm":
        no_slurm = slurm_complaint(request)
        found = [no_slurm or _in_use_complaint(RunDirectory(config.run.dir)), *found]
    return [complaint for complaint in found if complaint]


def refuse_run_in_use(run: RunDirectory) -> None:
    """Raise `UserError` where a job of this machine's SLURM waits for the run, or trains it."""
    with contextlib.suppress(SilentError):  # a run may go on where there is no SLURM
        if complaint := _in_use_complaint(run):
            raise UserError(complaint)


def _in_use_complaint(run: RunDirectory) -> str | None:
    for job in live_jobs_of(run):
        return f"run.dir: {run.path} is in use by job {job}; wait for it, or: {runs_command('stop', run.path)}"
    return None


def _data_complaint(config: Config) -> str | None:
    try:
        if config.data.mode == "stream":
            from caduceus.data.stream import expand_urls  # which imports torch

            expand_urls(config.data.path, "data.path", config.data.allow_commands)
        else:
            for stage in stages_of(config):
                with within(stage):
                    open_sources(stage.config.data, "train")
                    if config.valid.every:
                        open_sources(stage.config.data, "valid")
    except UserError as error:
        return str(error)
    return None


def _evaluations_complaint(config: Config) -> str | None:
    if not config.evaluations:
        return None
    from caduceus.evaluate.in_loop import check_evaluations, evaluations_in  # which import torch

    try:
        check_evaluations(evaluations_in(config), config.checkpoint.best)
    except UserError as error:
        return str(error)
    return None


def _time_complaint(config: Config, request: JobRequest) -> str | None:
    """The complaint about a job that would end before its first checkpoint, by the run's speed so far or the estimate
    for GPUs.
    """
    stages, rows = stages_of(config), RunDirectory(config.run.dir).newest_metrics("seconds", 100)
    current = rows[-1].get("stage", 1) if rows else 1
    if rows:
        measured = median(row["seconds"] for row in rows if row.get("stage", 1) == current)
        bases = stages[min(current, len(stages)) - 1].bases_of_a_step
        seconds = [measured * (stage.bases_of_a_step / bases) for stage in stages]
    elif request.gpus_per_node:
        node = request.processes_per_node
        seconds = [estimate(stage.config, request.world, node=node).step_seconds for stage in stages]
    else:
        return None
    step = max(seconds[current - 1 :])
    interval = step * min(config.checkpoint.every, config.train.steps)
    available = request.minutes * 60 - request.signal_seconds
    if interval <= available:
        return None
    return (
        f"time: {request.minutes} min, less {request.signal_seconds} s for the last checkpoint, is shorter than a "
        f"checkpoint interval of {interval / 60:.1f} min ({config.checkpoint.every} steps of {step:.2g} s); "
        "raise --time or lower checkpoint.every"
    )
