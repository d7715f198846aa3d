"""The steps of a run, until the last one or a stop: for a stage of training, and for a fine-tuning.

Each of the two overrides the methods in which it differs, such as its validation.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from caduceus.config import Config
from caduceus.data.loader import TrainLoader
from caduceus.distributed.ranks import PATIENCE, Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.errors import RetryError, UserError
from caduceus.monitor.rows import Monitor
from caduceus.run.directory import RunDirectory
from caduceus.train.best import Best
from caduceus.train.checkpointing import Checkpoints
from caduceus.train.guards import collect_garbage
from caduceus.train.handover import Handover
from caduceus.train.progress import Progress
from caduceus.train.step import training_step
from caduceus.train.stopping import EXIT_REQUEUE, StopRequest
from caduceus.train.watchdog import Watchdog

Row = dict[str, Any]

_log = logging.getLogger(__name__)


@dataclass
class Loop:
    """Takes the steps of a run, on all ranks together. `config` has every `auto` decided."""

    config: Config
    run: RunDirectory
    strategy: Strategy
    checkpoints: Checkpoints
    loader: TrainLoader
    progress: Progress
    monitor: Monitor
    stop: StopRequest
    watchdog: Watchdog

    def __post_init__(self) -> None:
        self.best = Best(self.config.checkpoint, self.strategy, self.run)
        self.handover = Handover(self._wishes)

    def is_over(self) -> bool:
        """Whether the last step has been taken; the same on all ranks."""
        return self.progress.step_of_stage >= self.config.train.steps

    @property
    def ends_the_run(self) -> bool:
        """Whether the run ends with the last step, as it has no further stage."""
        return True

    @contextlib.contextmanager
    def around_step(self) -> Iterator[None]:
        """A context for the next step."""
        with self.watchdog.over(f"step {self.progress.step + 1}"):
            yield

    def told_at_start(self) -> Row:
        """The numbers of the step that a start goes on from, for `best`; the same on all ranks."""
        return {}

    def validated(self) -> Row:
        """Validate and log the result. Returns its numbers, the same on all ranks."""
        return {}

    @property
    def evaluation_is_due(self) -> bool:
        """Whether `evaluated` has something to run; the same on all ranks."""
        return False

    def evaluated(self) -> Row:
        """Run the evaluations that are due after a step. Returns their numbers, the same on all ranks."""
        return {}

    @property
    def has_more_to_tell(self) -> bool:
        """Whether this rank asks for `tell_more`, which all ranks then call."""
        return False

    def tell_more(self) -> None:
        """Log what only all ranks together can tell."""

    def run_to_the_end(self) -> int:
        """Take steps until the last one or a stop. Returns the exit status, 0 or `EXIT_REQUEUE`."""
        self._keep_if_best(self.told_at_start())
        batches = iter(self.loader)
        while not self.is_over():
            try:
                with self.around_step():
                    training_step(
                        self.config, self.strategy, self.loader, batches, self.progress, handover=self.handover
                    )
            finally:
                self._log_complete_rows()
            collect_garbage(self.progress.step)
            if not self._pauses():
                continue
            self._settle()
            self._require_health()
            if self.progress.health.spiked and self._rewound():
                batches = iter(self.loader)
                continue
            told = self.validated() if self._validation_is_due() else {}
            is_best = self._taken_as_best({**told, **self.evaluated()})
            if self._stopped_after_saving(is_best):
                self.monitor.stopped = True
                _log.warning("stopped after step %d with a checkpoint; the same command goes on", self.progress.step)
                return EXIT_REQUEUE
        return 0

    def _pauses(self) -> bool:
        """Whether there is something to do before the next step; the same on all ranks."""
        health = self.progress.health
        due = self.evaluation_is_due or self.checkpoints.are_due(self.progress) or self._validation_is_due()
        return due or self.is_over() or health.spiked or health.consecutive_skips > 0 or any(self.handover.wished)

    def _validation_is_due(self) -> bool:
        every = self.config.valid.every
        return every > 0 and (self.is_over() or self.progress.step % every == 0)

    def _settle(self) -> None:
        """Log the row of the last step, which else waits for the next, and ask all ranks what they wish."""
        with self.watchdog.over(f"the agreement after step {self.progress.step}"):
            self.handover.settle(self.strategy.ranks)
        self._log_complete_rows()

    def _log_complete_rows(self) -> None:
        for row in self.handover.complete():
            self.monitor.log_training(row)

    def _wishes(self) -> list[bool]:
        """What this rank wishes, and all do if one does: to stop, to save, to wait for a save that has failed, to end
        as the run is another process's, and to `tell_more`."""
        stop = self.stop
        return [
            stop.requested,
            stop.save_requested(),
            self.checkpoints.failed,
            stop.taken_over(),
            self.has_more_to_tell,
        ]

    def _taken_as_best(self, told: Row) -> Row | None:
        facts = self.best.take(self.progress.step, told)
        if facts is not None:
            self.monitor.tell_best(self.progress.step, facts)
        return facts

    def _keep_if_best(self, told: Row) -> None:
        """Keep the checkpoint of the step just saved, if it is the best one of the run."""
        facts = self._taken_as_best(told)
        if facts is not None:
            with self.strategy.ranks.agreeing(), self.run.telling_of_disks():
                if self.strategy.ranks.is_main:
                    self.run.keep_best(self.progress.step, facts)

    def _require_health(self) -> None:
        """Raise `UserError` after too many bad steps, on all ranks; a checkpoint that is being written is finished
        first.
        """
        try:
            self.progress.health.refuse_to_go_on(self.config.train, self.run.logs_path)
        except UserError:
            with self.slowly("the checkpoint before the bad steps"):
                self.checkpoints.wait()
            raise

    def _rewound(self) -> bool:
        """Go back to the newest checkpoint; False where there is none."""
        with self.slowly("the rewind"):
            before = self.checkpoints.rewind(self.progress, self.loader)
        if before is None:
            return False
        self.progress = before
        with self.strategy.ranks.agreeing(), self.run.telling_of_disks():
            self.monitor.rewind(before.step)
        return True

    def _stopped_after_saving(self, is_best: Row | None) -> bool:
        """Let the ranks agree on what follows a step, and write a checkpoint where one is due. Returns whether
        to stop.
        """
        step, over = self.progress.step, self.is_over()
        complete = over and self.ends_the_run
        self._settle()
        stopping, saving, failed, taken_over, telling = self.handover.grant()
        stopping = stopping and not complete
        if taken_over:
            raise RetryError(
                f"run.dir: {self.run.path} was taken over by another process; this one ends without saving"
            )
        if telling:
            self.tell_more()
        with self.slowly(f"the checkpoint after step {step}"):
            if over or stopping or saving or is_best or self.checkpoints.are_due(self.progress):
                self.checkpoints.save(self.progress, is_best)
            if over or stopping or failed:
                self.checkpoints.wait()
        if complete or stopping:
            self.stop.is_saved()
        return stopping

    @contextlib.contextmanager
    def slowly(self, what: str) -> Iterator[None]:
        """Around what waits for files: it may take as long as ranks wait for each other there."""
        with slowly(self.watchdog, self.strategy.ranks, what):
            yield


@contextlib.contextmanager
def slowly(watchdog: Watchdog, ranks: Ranks, what: str) -> Iterator[None]:
    """Around what waits for files: it may take as long as ranks wait for each other there."""
    with watchdog.over(what, PATIENCE.total_seconds()), ranks.patiently():
        yield
