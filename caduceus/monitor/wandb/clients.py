"""The processes of W&B's client, which lead sessions of their own and may outlive who started them."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

_POLL_SECONDS = 0.3
_GONE_SECONDS = 5.0
"""After which a client that is not there does not come any more."""


def clients() -> list[int]:
    """The living processes of W&B's client that this process started."""
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
    """End the processes of W&B's client that this process started, whatever they are doing."""
    for pid in clients():
        with contextlib.suppress(OSError):  # it has ended by itself
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Watch:
    """Until `stop`, calls `lost(reason)` in a thread where no client lives or the start takes more than `seconds`.

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
                self._lost("W&B's client was killed as it began")
                return
            if time.monotonic() > deadline:
                self._lost(f"W&B's client does not begin within {self._seconds:.0f} s")
                return
