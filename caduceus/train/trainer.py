"""A run from its start through its stages to its end, in the same way on one process or many."""

import contextlib
import gc
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from caduceus.config import Config, Stage, stages_of
from caduceus.data.loader import ValidationLoader
from caduceus.devices import is_gpu
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.rendezvous import joined
from caduceus.distributed.strategy import Strategy
from caduceus.evaluate.extremes import SequenceLosses, told_windows
from caduceus.evaluate.heldout import held_out_loss
from caduceus.monitor.rows import Monitor
from caduceus.run.directory import RunDirectory
from caduceus.run.leaving import heard
from caduceus.train.evaluating import Evaluations
from caduceus.train.guards import scheduled_garbage_collection
from caduceus.train.loop import Loop, Row, slowly
from caduceus.train.machines import Machines
from caduceus.train.memory import keep_freed_memory_for
from caduceus.train.optimizer import averaged_weights
from caduceus.train.profiling import Profile
from caduceus.train.progress import Progress
from caduceus.train.recomputation import refusing_what_is_too_large
from caduceus.train.setup import Opened, Setup, open_run, open_stage, set_up
from caduceus.train.stages import stage_to_run
from caduceus.train.step import of_stage
from caduceus.train.stopping import StopRequest
from caduceus.train.watchdog import Watchdog, show_stacks_when_asked

T = TypeVar("T")

_log = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train until `train.steps`, from the newest valid checkpoint of the run directory if there is one.

    Every rank calls it. Returns the exit status: 0 when the run is complete, `EXIT_REQUEUE` when it stopped early with
    a checkpoint. A further stage of `train.stages` begins like a start, from the checkpoint at the end of the stage
    before, so that a run that was stopped there computes the same bits.
    """
    started = time.monotonic()
    show_stacks_when_asked()
    if config.run.device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory_for(config)
    with joined(stages_of(config)[0].config) as ranks, contextlib.ExitStack() as until_the_end:
        watchdog = Watchdog(RunDirectory(config.run.dir).logs_path, ranks.rank, config.train.stall_minutes)
        services: RunServices | None = None
        while True:
            with slowly(watchdog, ranks, "the look for checkpoints"):
                stage = stage_to_run(config, ranks)
            with _arranged(stage, ranks) as its_ranks:
                if services is None:
                    with slowly(watchdog, its_ranks, "the opening of the data"):
                        opened = open_run(stage, its_ranks)
                    until_the_end.callback(opened.run.release)
                    setup, services = _begin(stage, its_ranks, opened, watchdog, started)
                    for context in (
                        services.stop.listening(),
                        services.monitor,
                        scheduled_garbage_collection(),
                        heard(),
                    ):
                        until_the_end.enter_context(context)
                    _log.info("ready to train after %.1f s", time.monotonic() - started)
                else:
                    opened, setup = _go_on(stage, its_ranks, opened, services)
                loop = _loop_of(stage, setup, opened, services)
                status = loop.run_to_the_end()
                del loop, setup  # otherwise this stage's model would stay in memory beside the next one
            if status or stage.is_last:
                return status


@contextlib.contextmanager
def _arranged(stage: Stage, ranks: Ranks) -> Iterator[Ranks]:
    """The ranks, with the sharing of sequences that a stage uses; `ranks`: with that of the first stage."""
    if stage.number == 1:
        yield ranks
        return
    with joined(stage.config) as of_stage:
        yield of_stage


@dataclass(frozen=True)
class RunServices:
    """What a start of a run keeps through all its stages."""

    monitor: Monitor
    stop: StopRequest
    watchdog: Watchdog
    profile: Profile
    machines: Machines


def _begin(stage: Stage, ranks: Ranks, opened: Opened, watchdog: Watchdog, started: float) -> tuple[Setup, RunServices]:
    """Set up the stage that a start begins with, and what the start keeps through all stages."""
    run, config = opened.run, stage.run
    with slowly(watchdog, ranks, "the start"):
        machines = Machines(config, ranks)  # before DeepSpeed, which changes LOCAL_RANK
        setup = set_up(stage, ranks, opened, started)
        with ranks.agreeing(), run.telling_of_disks():
            profile = Profile(config, run.path, ranks)
            monitor = Monitor(config, run, active=ranks.is_main)
            stop = StopRequest(run, ranks.is_main, started, 60 * config.run.time_budget_minutes)
    return setup, RunServices(monitor, stop, watchdog, profile, machines)


def _go_on(stage: Stage, ranks: Ranks, opened: Opened, services: RunServices) -> tuple[Opened, Setup]:
    """Set up a further stage, from the checkpoint at the end of the one before."""
    gc.collect()
    if is_gpu(ranks.device):
        torch.cuda.empty_cache()  # the next stage has tensors of other sizes
    with slowly(services.watchdog, ranks, f"the beginning of stage {stage.number}"):
        opened = open_stage(opened, stage, ranks)
        setup = set_up(stage, ranks, opened)
        with ranks.agreeing(), opened.run.telling_of_disks():
            services.monitor.begin_stage(stage)
    return opened, setup


@dataclass
class _StageLoop(Loop):
    """The steps of a stage of a run."""

    stage: Stage
    validation: ValidationLoader | None
    evaluations: Evaluations
    profile: Profile
    machines: Machines

    @property
    def ends_the_run(self) -> bool:
        return self.stage.is_last

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        step, ranks = self.progress.step + 1, self.strategy.ranks
        with self.profile.of(step), super().around_step(), refusing_what_is_too_large(self.config, ranks):
            yield

    def told_at_start(self) -> Row:
        return self.evaluations.at_start(self.strategy, self.progress.step)

    def validated(self) -> Row:
        if self.validation is None:
            return {}
        with refusing_what_is_too_large(self.config, self.strategy.ranks):
            told, windows = _validate(self.strategy, self.validation, self.watchdog, self.config, self.progress)
        self.monitor.log_validation(told, windows)
        return told

    @property
    def evaluation_is_due(self) -> bool:
        return self.evaluations.are_due(self.progress.step)

    def evaluated(self) -> Row:
        return self.evaluations.after(self.strategy, self.progress.step)

    @property
    def has_more_to_tell(self) -> bool:
        return self.machines.are_due

    def tell_more(self) -> None:
        with self.watchdog.over(f"the machines after step {self.progress.step}"):
            self.monitor.log_machines(self.machines.row(self.progress.step))


def _loop_of(stage: Stage, setup: Setup, opened: Opened, services: RunServices) -> _StageLoop:
    run, monitor, stop, watchdog = opened.run, services.monitor, services.stop, services.watchdog
    evaluations = Evaluations(setup.config, run, opened.evaluations, monitor, stop, watchdog)
    what = setup.config, run, setup.strategy, setup.checkpoints, opened.loader, setup.progress, monitor, stop, watchdog
    return _StageLoop(*what, stage, opened.validation, evaluations, services.profile, services.machines)


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
