"""Stopping at a step boundary: Ctrl-C, the signals of schedulers, a budget of time, and the files STOP and SAVE."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

EXIT_REQUEUE = 75
"""Exit status of a run that stopped early with a checkpoint (EX_TEMPFAIL): start the same command again."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

_log = logging.getLogger(__name__)


class StopRequest:
    """Collects requests to stop or save on one rank; the training loop asks at every step boundary.

    A signal reaches one rank or all; only the main rank `watches` the files and the clock, `budget` seconds of it from
    the beginning of the monotonic time `started` (0: no limit).
    """

    def __init__(self, run_directory: Path, watches: bool, started: float, budget: float) -> None:
        self._stop_file = run_directory / "STOP"
        self._save_file = run_directory / "SAVE"
        self._watches = watches
        self._end = started + budget if budget else float("inf")
        self._signal: str | None = None
        begun = time.time() - (time.monotonic() - started)
        if watches and self._stop_file.exists() and self._stop_file.stat().st_mtime < begun:
            self._stop_file.unlink()  # it stopped an earlier start; one that came since then is for this one

    @property
    def requested(self) -> bool:
        """Whether a stop signal came, someone touched the file STOP, or the time is up."""
        return self._signal is not None or (
            self._watches and (self._stop_file.exists() or time.monotonic() >= self._end)
        )

    def save_requested(self) -> bool:
        """Whether someone touched the file SAVE since the last time asked."""
        if not self._watches or not self._save_file.exists():
            return False
        self._save_file.unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the stop signals into requests; a second Ctrl-C interrupts at once."""
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
        _log.warning("%s: stopping after this step with a checkpoint", self._signal)
