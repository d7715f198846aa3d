"""Runs tasks in worker processes, which end with their parent; with one worker, in this process."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import wait as wait_for_sentinel
from typing import Any

from caduceus.errors import UserError
from caduceus.patience import patiently


class Workers:
    """A pool of `count` processes. `run` may be called any number of times; the first call starts the processes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Yields (number of the task, result) as results come; an error of a task is raised and ends the run.

        A task that fails because of a passing error of a network file system is done again.
        """
        function = partial(_again_where_it_passes, function)
        if self.count == 1:
            for number, task in enumerate(tasks):
                yield number, function(task)
            return
        if self._pool is None:
            # spawn, not fork: a child must not hold our files open, least of all the lock
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, initializer=_follow_parent)
        try:
            yield from self._run_in_pool(self._pool, function, enumerate(tasks))
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps as memory ran out; run the same command again to go on, with "
                "fewer --workers"
            ) from None

    def _run_in_pool(self, pool: ProcessPoolExecutor, function: Callable, tasks: Iterator) -> Iterator:
        waiting: dict[Future, int] = {}

        def submit(count: int) -> None:
            waiting.update({pool.submit(function, task): number for number, task in islice(tasks, count)})

        submit(2 * self.count)
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
            submit(len(done))

    @contextmanager
    def aborted_on_error(self) -> Iterator[None]:
        """A context: before an error, or Ctrl-C, leaves it, the processes are ended."""
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """End the processes in the middle of their tasks, and wait until they are gone."""
        if self._pool is not None:
            for process in list(self._pool._processes.values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # the results of running tasks are not needed
            self.abort()
        elif self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _again_where_it_passes(function: Callable[[Any], Any], task: Any) -> Any:
    return patiently(lambda: function(task))


def _follow_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()

    def die_with_parent() -> None:
        wait_for_sentinel([parent.sentinel])
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
