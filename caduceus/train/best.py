"""Which step of a run is the best one by `checkpoint.best`."""

import math
from typing import Any

from caduceus.config import CheckpointConfig
from caduceus.distributed.strategy import Strategy
from caduceus.run.directory import RunDirectory

Row = dict[str, Any]


class Best:
    """Attribute `step`: the best step so far, None before there is one; the same on all ranks."""

    def __init__(self, config: CheckpointConfig, strategy: Strategy, run: RunDirectory) -> None:
        self._asked = {"metric": config.best, "is": config.best_is}
        before = strategy.ranks.broadcast(run.best() if strategy.ranks.is_main else None)
        same = before is not None and {name: before[name] for name in self._asked} == self._asked
        self._value: float | None = before["value"] if same else None
        self.step: int | None = before["step"] if same else None

    def take(self, step: int, told: Row) -> Row | None:
        """Compare the numbers `told` of a step. Returns facts for `RunDirectory.keep_best` where it is the best,
        otherwise None.
        """
        value = told.get(self._asked["metric"])
        if value is None or not math.isfinite(value):
            return None
        before, is_max = self._value, self._asked["is"] == "max"
        if before is not None and (value <= before if is_max else value >= before):
            return None
        self._value, self.step = value, step
        return {**self._asked, "value": value}
