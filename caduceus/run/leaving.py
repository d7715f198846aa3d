"""How a rank of several ends after a failure: heard, recorded, and within seconds. Imports no torch.

A process that ends as Python processes do first waits for the other ranks: a group of NCCL is destroyed by all of them
together, and those that still compute come to that after many minutes, if ever. So a rank that fails leaves its end
where the launcher looks, says why, and exits at once. Whoever started the ranks ends the others (torchrun, srun's
--kill-on-bad-exit, launch/local.py); a rank that only follows another one waits until that one was heard.
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
"""From a failure to the exit, whatever else of the process still wants to end in its own time."""
FOLLOW_SECONDS = 2.0
"""How long a rank that fails because of another one leaves that one to be the first that exits."""

_has_peers = False
_failure: BaseException | None = None


@contextlib.contextmanager
def among_peers() -> Iterator[None]:
    """Around what this process does while other ranks may wait for it; a failure is heard, and passes."""
    global _has_peers
    _has_peers = True
    with heard():
        yield
    _has_peers = False


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Within `among_peers`: a failure is recorded before anything outside of this ends, and the exit is near."""
    try:
        yield
    except BaseException as error:
        _hear(error)
        raise


@contextlib.contextmanager
def leaving(interrupted: str = "interrupted") -> Iterator[None]:
    """Around all that a process does: after a failure `among_peers` it says why, and exits at once.

    `interrupted` is said after Ctrl-C.
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
