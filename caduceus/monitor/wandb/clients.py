"""The processes of W&B's client, which have their own sessions and may outlive the process that started them."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

_POLL_SECONDS = 0.3
_GONE_SECONDS = 5.0
"""Seconds after which a client that has not appeared will not appear any more."""


def clients() -> list[int]:
    """Ids of the running processes of W&B's client that this process started."""
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        try:
            for pid in children.read_text().split():
                if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
        except OSError:  # it has ended by itself
            continue
    return found


def kill_clients() -> None:
    """Kill the processes of W&B's client that this process started."""
    for pid in clients():
        with contextlib.suppress(OSError):  # it has ended by itself
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Watch:
    """Until `stop`, a thread calls `lost(reason)` if no client runs, or its start takes more than `seconds`.

    The client's library waits without end for a process that was killed before it had begun.
    """

    def __init__(self, lost: Callable[[str], None], seconds: float) -> None:
        self._lost, self._seconds = lost, seconds
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        deadline = time.monotonic() + self._seconds
        alive = time.monotonic()
        while not self._stopped.wait(_POLL_SECONDS):
            alive = time.monotonic() if clients() else alive
            if time.monotonic() - alive > _GONE_SECONDS:
                self._lost("W&B's client was killed while it started")
                return
            if time.monotonic() > deadline:
                self._lost(f"W&B's client did not start within {self._seconds:.0f} s")
                return
