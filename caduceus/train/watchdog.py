"""Ends a process that hangs, and writes down what all its threads were doing; SIGUSR1 prints that at any time."""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

import torch.distributed as dist

from caduceus.distributed.environment import FLIGHT_FILES
from caduceus.run.ends import record_end_here
from caduceus.run.events import record_event

_GRACE_SECONDS = 15.0
"""Seconds between the dump and the end, in which the other ranks, which hang too, write their dumps."""

_NO_MORE = object()

T = TypeVar("T")

_log = logging.getLogger(__name__)


def show_stacks_when_asked() -> None:
    """Make SIGUSR1 write the stacks of all threads to stderr, even while the process hangs; it then goes on."""
    if sys.__stderr__ is not None:
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)


class Watchdog:
    """Watches one rank: each of its actions may take `minutes` (0: no limit).

    Stacks go to logs/stacks-rank0.txt, on GPUs NCCL's record of the last collectives to logs/nccl-rank0, and the
    process ends with status 1, as it would by any other failure.
    """

    def __init__(self, logs: Path, rank: int, minutes: float) -> None:
        self._path = logs / f"stacks-rank{rank}.txt"
        self._rank = rank
        self._limit = 60 * minutes
        self._watched: tuple[str, float, float] | None = None
        self._over = threading.Event()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop watching: the process goes on to something else."""
        self._over.set()

    @contextlib.contextmanager
    def over(self, what: str, at_least: float = 0.0) -> Iterator[None]:
        """A context for an action that has to end in time; `at_least`: seconds that it may take, if that is more than
        the limit.
        """
        self._watched = (what, time.monotonic(), max(self._limit, at_least))
        try:
            yield
        finally:
            self._watched = None

    def over_each(self, what: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; making and using each has to end in time."""
        iterator = iter(items)
        while True:
            with self.over(what):
                item = next(iterator, _NO_MORE)
                if item is _NO_MORE:
                    return
                yield item

    def _watch(self) -> None:
        pause = min(1.0, self._limit / 10)
        while not self._over.wait(pause):
            watched = self._watched
            if watched is not None and time.monotonic() - watched[1] > watched[2]:
                self._end(watched[0], watched[2] / 60)
                return

    def _end(self, what: str, minutes: float) -> None:
        # This comes first, as the disk to which the stacks go may be what hangs.
        threading.Timer(_GRACE_SECONDS, os._exit, (1,)).start()
        try:
            with self._path.open("a") as file:
                self._dump(what, file)
        except OSError:
            self._dump(what, sys.stderr)
        limit = f"train.stall_minutes={minutes:g}" if 60 * minutes == self._limit else f"{minutes:g} minutes"
        told = f"rank {self._rank}: {what} has taken more than {limit}; what it was doing is in {self._path}"
        _log.error(told)
        record_event(self._path.parent.parent, "stalled", None, reason=told)
        record_end_here(TimeoutError(told))
        with contextlib.suppress(OSError):
            write_flight_records(self._path.parent, self._rank)

    def _dump(self, what: str, file: TextIO) -> None:
        file.write(f"rank {self._rank}, {what}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
        file.flush()
        faulthandler.dump_traceback(file)


def write_flight_records(logs: Path, rank: int) -> None:
    """Write NCCL's record of this rank's last collectives, which NCCL itself would write only minutes later.

    `torchfrtrace --prefix nccl-rank LOGS` finds the first collective in which ranks differ.
    """
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        from torch._C._distributed_c10d import _dump_nccl_trace

        (logs / f"{FLIGHT_FILES}{rank}").write_bytes(_dump_nccl_trace())
