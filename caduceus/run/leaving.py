"""How one of several ranks ends after a failure: recorded, reported, and within seconds. Imports no torch.

A Python process that ends normally first waits for the other ranks: they destroy an NCCL group together, and those that
still compute come to that after many minutes, or never. So a rank that fails records its end for the launcher, prints
why, and exits at once. The parent of the ranks (torchrun, srun's --kill-on-bad-exit, launch/local.py) ends the others.
A rank that fails because of another one waits until that one has reported its failure.
"""

import contextlib
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from caduceus.errors import Kind, kind_of, tell
from caduceus.run.ends import record_end_here

END_SECONDS = 6.0
"""Seconds from a failure to the exit, whatever else in the process has not finished."""
FOLLOW_SECONDS = 2.0
"""Seconds that a rank waits before it exits after another rank's failure, so that the other one exits first."""

_has_peers = False
_failure: BaseException | None = None


@contextlib.contextmanager
def among_peers() -> Iterator[None]:
    """A context for work during which other ranks may wait for this one. A failure is reported, and then passes."""
    global _has_peers
    _has_peers = True
    with heard():
        yield
    _has_peers = False


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """A context within `among_peers`: a failure is recorded before any outer context ends, and the exit
    follows soon.
    """
    try:
        yield
    except BaseException as error:
        _hear(error)
        raise


@contextlib.contextmanager
def leaving(interrupted: str = "interrupted") -> Iterator[None]:
    """A context for all the work of a process: after a failure `among_peers` it prints why, and exits at once.

    After Ctrl-C it prints `interrupted`.
    """
    try:
        yield
    except BaseException as error:
        if _failure is not None:
            _leave(tell(error, interrupted))
        raise


def _hear(error: BaseException) -> None:
    global _failure
    if not _has_peers:
        return
    first, _failure = _failure is None, error
    record_end_here(error)
    if first:
        last = threading.Timer(END_SECONDS, lambda: _leave(tell(_failure)))
        last.daemon = True
        last.start()


def _leave(status: int) -> NoReturn:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if _failure is not None and kind_of(_failure) is Kind.PEER:
        time.sleep(FOLLOW_SECONDS)
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)
