"""The training loop, the same on one process or many."""

import contextlib
import gc
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from caduceus.config import Config, Stage, stages_of
from caduceus.data.loader import ValidationLoader
from caduceus.distributed.ranks import PATIENCE, Ranks
from caduceus.distributed.rendezvous import joined
from caduceus.distributed.strategy import Strategy
from caduceus.errors import RetryError
from caduceus.evaluate.extremes import SequenceLosses, told_windows
from caduceus.evaluate.heldout import held_out_loss
from caduceus.monitor.rows import Monitor
from caduceus.run.directory import RunDirectory
from caduceus.run.leaving import heard
from caduceus.train.evaluating import Best, Evaluations
from caduceus.train.guards import collect_garbage, scheduled_garbage_collection
from caduceus.train.machines import Machines
from caduceus.train.memory import keep_freed_memory_for
from caduceus.train.optimizer import averaged_weights
from caduceus.train.profiling import Profile
from caduceus.train.progress import Progress
from caduceus.train.recomputation import refusing_what_is_too_large
from caduceus.train.setup import Opened, Setup, open_run, open_stage, set_up
from caduceus.train.stages import stage_to_run
from caduceus.train.step import of_stage, training_step
from caduceus.train.stopping import EXIT_REQUEUE, StopRequest
from caduceus.train.watchdog import Watchdog, show_stacks_when_asked

Row = dict[str, Any]
T = TypeVar("T")

_log = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train until `train.steps`, from the newest valid checkpoint of the run directory if there is one.

    Runs on every rank. Returns the exit status: 0 when the run is complete, `EXIT_REQUEUE` when it stopped early with a
    checkpoint. A further stage of `train.stages` begins as a start does, from the checkpoint at the end of the one
    before, so that a run which is stopped there goes on to the same bits.
    """
    started = time.monotonic()
    show_stacks_when_asked()
    if config.run.device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory_for(config)
    with joined(stages_of(config)[0].config) as ranks, contextlib.ExitStack() as until_the_end:
        watchdog = Watchdog(RunDirectory(config.run.dir).logs_path, ranks.rank, config.train.stall_minutes)
        watch: Watch | None = None
        while True:
            with _slowly(watchdog, ranks, "the look for checkpoints"):
                stage = stage_to_run(config, ranks)
            with _arranged(stage, ranks) as its_ranks:
                if watch is None:
                    with _slowly(watchdog, its_ranks, "the opening of the data"):
                        opened = open_run(stage, its_ranks)
                    until_the_end.callback(opened.run.release)
                    setup, watch = _begin(stage, its_ranks, opened, watchdog, started)
                    for context in (watch.stop.listening(), watch.monitor, scheduled_garbage_collection(), heard()):
                        until_the_end.enter_context(context)
                    _log.info("ready to train after %.1f s", time.monotonic() - started)
                else:
                    opened, setup = _go_on(stage, its_ranks, opened, watch)
                status = _loop(stage, setup, opened, watch)
                del setup  # or the next stage would be built beside this one's model
            if status or stage.is_last:
                return status


@contextlib.contextmanager
def _arranged(stage: Stage, ranks: Ranks) -> Iterator[Ranks]:
    """The ranks as a stage shares its sequences between them; `ranks`: as the first one does."""
    if stage.number == 1:
        yield ranks
        return
    with joined(stage.config) as of_stage:
        yield of_stage


@contextlib.contextmanager
def _slowly(watchdog: Watchdog, ranks: Ranks, what: str) -> Iterator[None]:
    """Around what waits for files: it may take as long as ranks wait for each other there."""
    with watchdog.over(what, PATIENCE.total_seconds()), ranks.patiently():
        yield


@dataclass(frozen=True)
class Watch:
    """What goes with a start of a run through all its stages."""

    monitor: Monitor
    stop: StopRequest
    watchdog: Watchdog
    profile: Profile
    machines: Machines


def _begin(stage: Stage, ranks: Ranks, opened: Opened, watchdog: Watchdog, started: float) -> tuple[Setup, Watch]:
    """The stage that a start begins with, and what goes with all that it comes to."""
    run, config = opened.run, stage.run
    with _slowly(watchdog, ranks, "the start"):
        machines = Machines(config, ranks)  # first: it tells ranks apart by LOCAL_RANK, which DeepSpeed wants otherwise
        setup = set_up(stage, ranks, opened, started)
        with ranks.agreeing(), run.telling_of_disks():
            profile = Profile(config, run.path, ranks)
            monitor = Monitor(config, run, active=ranks.is_main)
            stop = StopRequest(run, ranks.is_main, started, 60 * config.run.time_budget_minutes)
    return setup, Watch(monitor, stop, watchdog, profile, machines)


def _go_on(stage: Stage, ranks: Ranks, opened: Opened, watch: Watch) -> tuple[Opened, Setup]:
    """A further stage, from the checkpoint at the end of the one before."""
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()  # of tensors of other sizes
    with _slowly(watch.watchdog, ranks, f"the beginning of stage {stage.number}"):
        opened = open_stage(opened, stage, ranks)
        setup = set_up(stage, ranks, opened)
        with ranks.agreeing(), opened.run.telling_of_disks():
            watch.monitor.begin_stage(stage)
    return opened, setup


def _loop(stage: Stage, setup: Setup, opened: Opened, watch: Watch) -> int:
    """Steps until the last one of the stage or a stop; returns the exit status."""
    config, strategy, checkpoints, progress = setup.config, setup.strategy, setup.checkpoints, setup.progress
    run, loader, validation = opened.run, opened.loader, opened.validation
    monitor, stop, watchdog, profile = watch.monitor, watch.stop, watch.watchdog, watch.profile
    evaluations = Evaluations(config, run, opened.evaluations, monitor, stop, watchdog)
    best = Best(config.checkpoint, strategy, run)
    best.keep(progress.step, evaluations.at_start(strategy, progress.step))
    batches = iter(loader)
    while progress.step_of_stage < config.train.steps:
        step = progress.step + 1
        with profile.of(step), watchdog.over(f"step {step}"), refusing_what_is_too_large(config, strategy.ranks):
            row = training_step(config, strategy, loader, batches, progress)
        monitor.log_training(row)
        collect_garbage(progress.step)
        progress.health.refuse_to_go_on(config.train, run.logs_path)
        if progress.health.spiked:
            with _slowly(watchdog, strategy.ranks, "the rewind"):
                before = checkpoints.rewind(progress, loader)
            if before is not None:
                progress, batches = before, iter(loader)
                with strategy.ranks.agreeing(), run.telling_of_disks():
                    monitor.rewind(progress.step)
                continue
        last, told = progress.step_of_stage == config.train.steps, {}
        if validation is not None and (last or progress.step % config.valid.every == 0):
            with refusing_what_is_too_large(config, strategy.ranks):
                told, windows = _validate(strategy, validation, watchdog, config, progress)
            monitor.log_validation(told, windows)
        is_best = best.take(progress.step, {**told, **evaluations.after(strategy, progress.step)})
        complete = last and stage.is_last
        with watchdog.over(f"the agreement after step {progress.step}"):
            wishes = strategy.ranks.gather(
                [
                    stop.requested and not complete,
                    stop.save_requested(),
                    checkpoints.failed,
                    stop.taken_over(),
                    watch.machines.are_due,
                ]
            )
        stopping, saving, failed, taken_over, telling = wishes.any(0).tolist()
        if taken_over:
            raise RetryError(f"run.dir: {run.path} was taken over by another process; this one ends without saving")
        if telling:
            with watchdog.over(f"the machines after step {progress.step}"):
                monitor.log_machines(watch.machines.row(progress.step))
        with _slowly(watchdog, strategy.ranks, f"the checkpoint after step {progress.step}"):
            if last or stopping or saving or is_best or checkpoints.are_due(progress):
                checkpoints.save(progress, is_best)
            if last or stopping or failed:
                checkpoints.wait()
        if complete or stopping:
            stop.is_saved()
        if stopping:
            monitor.stopped = True
            _log.warning("stopped after step %d with a checkpoint; the same command goes on", progress.step)
            return EXIT_REQUEUE
    return 0


def _validate(
    strategy: Strategy, validation: ValidationLoader, watchdog: Watchdog, config: Config, progress: Progress
) -> tuple[Row, list[Row]]:
    """The row of a validation, and on the main rank its worst and best windows."""
    ranks, losses = strategy.ranks, SequenceLosses(validation)

    def together(batches: Iterable[T]) -> Iterator[T]:
        return watchdog.over_each(f"a batch of the validation after step {progress.step}", ranks.together(batches))

    row = held_out_loss(
        strategy.model,
        validation,
        ranks.device,
        config.train.precision,
        add_up=ranks.sum,
        each=together,
        mirror=None if config.data.objective == "next_base" else ranks.mirrored,
        seen=losses.add,
    )
    if config.train.ema:
        with averaged_weights(strategy):
            of_average = held_out_loss(
                strategy.model, validation, ranks.device, config.train.precision, add_up=ranks.sum, each=together
            )
        row["valid_loss_ema"] = of_average["valid_loss"]
    windows = []
    if config.monitor.windows:
        chosen = losses.extremes(ranks, config.monitor.windows)
        windows = told_windows(chosen, strategy, validation, config, together)
    return {"step": progress.step, **of_stage(config, progress), **row}, windows
