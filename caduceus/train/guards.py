"""What keeps a long run healthy: it skips bad steps, notices jumps of the loss, and schedules garbage collection.

Every decision follows from numbers that are the same on all ranks, so that no rank decides alone.
"""

import contextlib
import gc
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caduceus.config import TrainConfig
from caduceus.data.loader import TrainLoader
from caduceus.errors import UserError
from caduceus.files import append_json_line

LOSS_MEMORY = 50
"""Time constant of the running mean of the loss, in steps; before so many steps nothing counts as a spike."""
MAX_REWINDS = 3
"""Rewinds to one checkpoint; after so many the run ends, as other samples did not help."""
COLLECTION_STEPS = 200
"""Steps between garbage collections. A collection on one rank at another time would delay all ranks."""

_log = logging.getLogger(__name__)


@dataclass
class Health:
    """What the guards remember about a run; part of its checkpoints."""

    skipped_steps: int = 0
    consecutive_skips: int = 0
    """Steps in a row whose loss or gradient was not finite."""
    spiked: bool = False
    """Whether the last step was skipped because its loss jumped."""
    rewinds: int = 0
    """Rewinds since the last checkpoint."""
    mean_loss: float = 0.0
    counted_losses: int = 0

    def may_update(self, loss: float, grad_norm: float, config: TrainConfig) -> bool:
        """Whether the step with this global loss and gradient norm may update the parameters."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self.spiked = finite and self._is_spike(loss, config.spike_factor)
        if finite and not self.spiked:
            self.consecutive_skips = 0
            self._remember(loss)
            return True
        self.skipped_steps += 1
        self.consecutive_skips += not finite
        return False

    def refuse_to_go_on(self, config: TrainConfig, logs: Path) -> None:
        """Raise `UserError` after more than `train.max_skipped_steps` non-finite steps in a row."""
        if self.consecutive_skips > config.max_skipped_steps:
            raise UserError(
                f"train.max_skipped_steps: loss or gradient were not finite in {self.consecutive_skips} steps in a "
                f"row; {logs}/skipped-rank*.jsonl name the samples: look at these, or lower train.lr"
            )

    def _is_spike(self, loss: float, factor: float) -> bool:
        return bool(factor) and self.counted_losses >= LOSS_MEMORY and loss > factor * self.mean_loss

    def _remember(self, loss: float) -> None:
        self.counted_losses += 1
        self.mean_loss += (loss - self.mean_loss) / min(self.counted_losses, LOSS_MEMORY)


def report_skipped_step(logs: Path, rank: int, loader: TrainLoader, step: int, reason: str, numbers: list[int]) -> None:
    """Write a line to logs/skipped-rank0.jsonl: the samples of this rank that may be the cause of a skipped step.

    Where this file cannot be written, or the samples' places cannot be read, their numbers go to the log.
    """
    path = logs / f"skipped-rank{rank}.jsonl"
    try:
        samples = [{"g": g, **loader.describe(g)} for g in numbers]
        append_json_line(path, {"step": step, "rank": rank, "reason": reason, "samples": samples})
        where = f"in {path}"
    except (OSError, UserError) as error:
        where = f"g = {numbers} ({error})"
    _log.warning("step %d skipped: %s; its samples on rank %d are %s", step, reason, rank, where)


@contextlib.contextmanager
def scheduled_garbage_collection() -> Iterator[None]:
    """A context in which Python collects garbage only in `collect_garbage`, at the same steps on all ranks."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def collect_garbage(step: int) -> None:
    if step % COLLECTION_STEPS == 0:
        gc.collect()
