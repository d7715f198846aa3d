"""Ends a process whose step hangs, and leaves behind what all its threads were doing."""

import contextlib
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_GRACE_SECONDS = 5.0
"""From the dump to the end: the other ranks hang as well, and write their stacks before they lose their peers."""

_log = logging.getLogger(__name__)


class Watchdog:
    """Watches the steps of one rank; each may take `minutes` (0: any time).

    Stacks go to logs/stacks-rank0.txt, and the process ends with status 1, as it would by any other failure.
    """

    def __init__(self, logs: Path, rank: int, minutes: float) -> None:
        self._path = logs / f"stacks-rank{rank}.txt"
        self._rank = rank
        self._limit = 60 * minutes
        self._step: tuple[int, float] | None = None
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def over(self, step: int) -> Iterator[None]:
        """Around a step: it has to end in time."""
        self._step = (step, time.monotonic())
        try:
            yield
        finally:
            self._step = None

    def _watch(self) -> None:
        pause = min(1.0, self._limit / 10)
        while True:
            time.sleep(pause)
            step = self._step
            if step is not None and time.monotonic() - step[1] > self._limit:
                self._end(step[0])

    def _end(self, step: int) -> None:
        with self._path.open("a") as file:
            file.write(f"rank {self._rank}, step {step}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
            file.flush()
            faulthandler.dump_traceback(file)
        _log.error(
            "rank %d: step %d has taken more than train.stall_minutes=%g; what it was doing is in %s",
            self._rank,
            step,
            self._limit / 60,
            self._path,
        )
        time.sleep(_GRACE_SECONDS)
        os._exit(1)
