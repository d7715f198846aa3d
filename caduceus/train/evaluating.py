"""Runs the section `evaluations` while a run trains.

The verbs run on a copy of the weights, on the same ranks, and the random number generators are restored after them:
training computes the same bits with and without them. Where an evaluation fails, its numbers are missing: there is a
warning and an event, and the run goes on. Only the loss of contact to another rank ends the run. If the run is told to
stop, an evaluation is broken off and repeated at the next start.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from caduceus import CaduceusForMaskedLM
from caduceus.config import Config
from caduceus.config.evaluations import SPACE
from caduceus.devices import is_gpu
from caduceus.distributed.ranks import PATIENCE, is_lost_contact
from caduceus.distributed.strategy import Strategy
from caduceus.errors import PeerError, RetryError, one_line
from caduceus.evaluate.model import Runner
from caduceus.monitor.rows import Monitor
from caduceus.run.directory import RunDirectory
from caduceus.run.events import record_event
from caduceus.train.checkpointing import rng_state, set_rng_state
from caduceus.train.optimizer import averaged_weights
from caduceus.train.stopping import StopRequest
from caduceus.train.watchdog import Watchdog

if TYPE_CHECKING:
    from caduceus.evaluate.in_loop import InLoop

Row = dict[str, Any]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a run, on this rank."""

    config: Config
    run: RunDirectory
    found: "Sequence[InLoop]"
    monitor: Monitor
    stop: StopRequest
    watchdog: Watchdog

    def are_due(self, step: int) -> bool:
        """Whether there are some to run after a step."""
        return any(step % one.every == 0 for one in self.found)

    def after(self, strategy: Strategy, step: int) -> Row:
        """Run the evaluations that are due after a step. Returns their numbers by their names in metrics.jsonl, the
        same on all ranks.
        """
        due = [one for one in self.found if step % one.every == 0]
        return self._run(strategy, step, due)

    def at_start(self, strategy: Strategy, step: int) -> Row:
        """The numbers of the step that a start goes on from: those in metrics.jsonl, and those of evaluations that an
        earlier start broke off, which run now, as in `after`.
        """
        if step == 0:
            return {}
        rows: list[Row] = []
        with strategy.ranks.agreeing(), self.run.telling_of_disks():
            if strategy.ranks.is_main:
                found = [
                    *self.run.newest_metrics("evaluated", 10 * len(self.found)),
                    *self.run.newest_metrics("valid_loss"),
                ]
                rows = [row for row in found if row["step"] == step]
        rows = strategy.ranks.broadcast(rows)
        made = {row.get("evaluated") for row in rows}
        told = {name: value for row in rows for name, value in row.items() if name != "evaluated"}
        due = [one for one in self.found if step % one.every == 0 and one.name not in made]
        return {**told, **self._run(strategy, step, due)}

    def _run(self, strategy: Strategy, step: int, due: "Sequence[InLoop]") -> Row:
        if not due:
            return {}
        told: Row = {}
        with _same_random_numbers(), self._slowly(strategy, f"the copy of the weights after step {step}"):
            runner = self._runner(strategy)
            for one in due:
                with self._slowly(strategy, f"{one.key} after step {step}"):
                    told |= self._numbers(one, runner, strategy, step)
        del runner
        if is_gpu(strategy.ranks.device):
            torch.cuda.empty_cache()
        return told

    def _numbers(self, one: "InLoop", runner: Runner, strategy: Strategy, step: int) -> Row:
        started, failure = time.monotonic(), None
        try:
            numbers = one.run(runner, strategy.ranks)
        except Exception as error:
            if is_lost_contact(error) or (isinstance(error, PeerError) and error.rank is None):
                raise
            failure = error
        if failure is not None:
            if strategy.ranks.is_main:
                self._tell_failure(one, step, failure)
            return {}
        row = {**one.row(numbers), f"{SPACE}{one.name}/seconds": time.monotonic() - started}
        self.monitor.log_evaluation({"step": step, "evaluated": one.name, **row})
        return row

    def _tell_failure(self, one: "InLoop", step: int, failure: Exception) -> None:
        reason = one_line(failure)
        if isinstance(failure, _StoppingError) or (isinstance(failure, PeerError) and _StoppingError.words in reason):
            _log.warning("%s: broken off after step %d, as the run stops; the next start repeats it", one.key, step)
            return
        _log.warning("%s: failed after step %d, and the run goes on without its numbers: %s", one.key, step, reason)
        record_event(self.run.path, "evaluation failed", step, name=one.name, reason=reason)

    def _runner(self, strategy: Strategy) -> Runner:
        """A copy of the model, with the current weights, or their average over steps where the run keeps one."""
        average = averaged_weights(strategy) if self.config.train.ema else contextlib.nullcontext()
        with average:
            weights = strategy.whole_weights()
        with torch.device("meta"):
            model = CaduceusForMaskedLM(self.config.model, self.config.ops.backend)
        model.load_state_dict(weights, assign=True)
        model.complement = strategy.network.complement
        return _Interruptible(model, self.stop, strategy.ranks.device.type, self.config.train.precision)

    @contextlib.contextmanager
    def _slowly(self, strategy: Strategy, what: str) -> Iterator[None]:
        with self.watchdog.over(what, PATIENCE.total_seconds()), strategy.ranks.patiently():
            yield


class _StoppingError(RetryError):
    """The run is to stop: the evaluation ends here."""

    words = "the run stops"


class _Interruptible(Runner):
    """Ends an evaluation between two batches where the run is told to stop."""

    def __init__(self, model: CaduceusForMaskedLM, stop: StopRequest, device: str, precision: str) -> None:
        super().__init__(model, device, "bf16" if precision == "bf16" else "fp32")
        self._stop = stop

    def ids(self, bases: Any) -> torch.Tensor:
        if self._stop.requested:
            raise _StoppingError(_StoppingError.words)
        return super().ids(bases)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """A context that may draw random numbers; after it, the generators have their former states."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
