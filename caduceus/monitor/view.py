"""The numbers that are shown about a run while it trains, computed from its rows and its directory."""

import time
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean, median
from typing import Any

from caduceus.config import Config, stages_of
from caduceus.patience import patiently
from caduceus.run.directory import RunDirectory
from caduceus.run.rows import lines_from_end

RECENT_STEPS = 50
"""Number of steps over which rates, and the trend of the loss, are computed."""
WARM_UP_STEPS = 2
"""Number of first steps of a start, which compile and warm up: rates ignore them as soon as there are others."""
_LOOK_SECONDS = 5.0
BEST = "best_valid_loss"
"""In a row of a validation: the smallest validation loss so far, that of step `best_step`."""


class View:
    """The state of a run, from rows of metrics.jsonl in their order."""

    @classmethod
    def of(cls, run: RunDirectory, name: str, config: Config) -> "View":
        """The view of a run with this configuration."""
        stages = [(stage.config.train.steps, stage.bases_of_a_step) for stage in stages_of(config)]
        return cls(run, name, config.train.steps, config.valid.every, stages)

    def __init__(
        self, run: RunDirectory, name: str, steps: int, valid_every: int, stages: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.name = name
        self._stages = stages
        """(steps, bases per step) of each stage of the run."""
        self.steps = steps
        self._run = run
        self._valid_every = valid_every
        self._looked = 0.0
        self.checkpoint = 0
        """Step of the newest checkpoint; 0 is none."""
        self.checkpoint_time = 0.0
        self.starts = 0
        self._trains_here = False
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.row: dict[str, Any] = {}
        self.valid: tuple[int, float] | None = None
        self.best_valid: tuple[int, float] | None = None
        self._losses: deque[float] = deque(maxlen=2 * RECENT_STEPS)
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._rates: deque[float] = deque(maxlen=RECENT_STEPS)
        self._validation_seconds: deque[float] = deque(maxlen=5)
        self._validated = 0
        self._before: float | None = None
        self._steps_seen = 0

    def recall(self) -> int:
        """Take in the last rows of metrics.jsonl. Returns the byte up to which it was read."""
        self.reset()
        newest = next(lines_from_end(self._run.metrics_path), None)
        if newest is None:
            return 0
        validations = self._run.newest_metrics("valid_loss", 1, newest.end)
        if validations and BEST not in validations[0]:  # by an earlier version: only all of them tell the best
            validations = [line.row for line in lines_from_end(self._run.metrics_path, "valid_loss", newest.end)][::-1]
        for row in [*validations, *self._run.newest_metrics("loss", 2 * RECENT_STEPS, newest.end)]:
            self.take(row)
        return newest.end

    def begin_start(self) -> None:
        """Note that a start begins in this process: its first steps are slow."""
        self._steps_seen, self._before, self._trains_here = 0, None, True

    def take(self, row: dict[str, Any], now: float | None = None) -> None:
        """Take in a row; `now`: the monotonic time at which this process made it, None where another one did."""
        self._trains_here |= now is not None
        if "valid_loss" in row:
            self._take_validation(row, now)
        if "evaluated" in row and now is not None and self._before is not None:
            self._before = now  # rows of evaluations change neither the step nor the time left
        if "loss" not in row:
            return
        self.row = row
        self._steps_seen += 1
        if row["loss"] is not None:
            self._losses.append(row["loss"])
        self._before = now
        if self._steps_seen <= WARM_UP_STEPS + 1:
            self._seconds.clear()
            self._rates.clear()
        self._seconds.append(row["seconds"])  # and not the time between rows, of which some come a step late
        self._rates.append(row["tokens_per_second"])

    def _take_validation(self, row: dict[str, Any], now: float | None) -> None:
        self._validated = row["step"]
        if row["valid_loss"] is not None:
            self.valid = (row["step"], row["valid_loss"])
            if self.best_valid is None or row["valid_loss"] < self.best_valid[1]:
                self.best_valid = self.valid
        if row.get(BEST) is not None:
            self.best_valid = (row["best_step"], row[BEST])
        if now is not None and self._before is not None:
            self._validation_seconds.append(now - self._before)
            self._before = now

    def look(self) -> None:
        """Read the run directory, at most from time to time."""
        if time.monotonic() - self._looked < _LOOK_SECONDS and self._looked:
            return
        self._looked = time.monotonic()
        found = self._run.checkpoints()
        self.starts = len(self._run.starts())
        if found:
            self.checkpoint = found[-1].step
            try:
                self.checkpoint_time = patiently(found[-1].path.stat).st_mtime
            except OSError:  # it has just been removed
                return

    @property
    def step(self) -> int:
        return self.row.get("step", 0)

    @property
    def loss(self) -> float | None:
        """Mean loss over the recent steps."""
        recent = list(self._losses)[-RECENT_STEPS:]
        return fmean(recent) if recent else None

    @property
    def trend(self) -> float | None:
        """The mean loss of the recent steps minus that of as many before them; None where there are too few."""
        losses = list(self._losses)
        half = len(losses) // 2
        return fmean(losses[half:]) - fmean(losses[:half]) if half >= 5 else None

    @property
    def bases_per_second(self) -> float | None:
        return median(self._rates) if self._rates else None

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the recent steps; None during the first steps of a start, which compile and fill caches."""
        return median(self._seconds) if self._steps_seen > WARM_UP_STEPS else None

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until the last step, with the validations to come; None where there is no estimate yet.

        Only the process that trains can tell steps from compilation and validations. Other processes read its rows.
        """
        if not self._trains_here:
            return self.row.get("seconds_left")
        if self.seconds_per_step is None:
            return None
        left = self._steps_left * self.seconds_per_step
        if self._validation_seconds:
            left += self._validations_left * fmean(self._validation_seconds)
        return left

    @property
    def _validations_left(self) -> int:
        """Validations to come: after the newest step, if one is due, every `valid.every` steps, and at the end of each
        stage.
        """
        first, every = self.step + (self._validated == self.step), self._valid_every
        ends = accumulate(steps for steps, _ in self._stages) if self._stages else [self.steps]
        return self.steps // every - (first - 1) // every + sum(end >= first and end % every > 0 for end in ends)

    @property
    def _steps_left(self) -> float:
        """Remaining steps; steps of later stages are converted to steps of this one by their bases."""
        left, bases_now, end = 0, None, 0
        for steps, bases in self._stages:
            end += steps
            missing = min(steps, max(0, end - self.step))
            left += missing * bases
            if missing and bases_now is None:
                bases_now = bases
        return self.steps - self.step if bases_now is None else left / bases_now


def clock(seconds: float) -> str:
    """Seconds as text, such as 3 d 04:05 or 0:12:34."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{seconds:02d}"
