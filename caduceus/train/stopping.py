"""Stopping at a step boundary: Ctrl-C, the signals of schedulers, a budget of time, and the files STOP and SAVE."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from caduceus.patience import is_file, patiently
from caduceus.run.agent import AGENT, agent_is_gone
from caduceus.run.directory import RunDirectory

EXIT_REQUEUE = 75
"""Exit status of a run that stopped early with a checkpoint (EX_TEMPFAIL): start the same command again."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_LOOK_SECONDS = 1.0
"""Seconds between looks at the files of the run, which on a shared file system can take longer than a short step."""
_SAME_SECONDS = 1.0
"""Seconds in which a second Ctrl-C counts as the first: torchrun passes on the signal that the terminal has already
sent.
"""

_log = logging.getLogger(__name__)


class StopRequest:
    """Collects requests to stop or save on one rank; the training loop asks at every step boundary.

    A signal, or the end of torchrun, may reach one rank or all. Only the main rank `watches` the files and the time
    limit: `budget` seconds (0: no limit) from the monotonic time `started`.
    """

    def __init__(self, run: RunDirectory, watches: bool, started: float, budget: float) -> None:
        self._run = run
        self._looked = float("-inf")
        self._seen = {"stop": False, "save": False, "lost": False}
        self._stop_file = run.stop_path
        self._save_file = run.save_path
        self._watches = watches
        self._end = started + budget if budget else float("inf")
        self._signal: str | None = None
        self._first_interrupt: float | None = None
        self._ending = False
        self._is_orphan = False
        if watches:
            self._remove_old_stop_file(run.file_clock_lead)

    @property
    def requested(self) -> bool:
        """Whether a stop signal came, torchrun is gone, the user touched the file STOP, or the time is up."""
        if not self._is_orphan and agent_is_gone():
            self._is_orphan = True
            _log.warning("torchrun, which started this rank, is gone: stopping after this step with a checkpoint")
        return (
            self._signal is not None
            or self._is_orphan
            or (self._watches and (self._sees("stop") or time.monotonic() >= self._end))
        )

    def save_requested(self) -> bool:
        """Whether the user touched the file SAVE since the last call."""
        if not self._sees("save"):
            return False
        self._seen["save"] = False
        self._save_file.unlink(missing_ok=True)
        return True

    def taken_over(self) -> bool:
        """Whether another process has taken the run directory from this rank, which held it."""
        return self._sees("lost")

    def _sees(self, what: str) -> bool:
        """Whether the last look at the files found `what`: the file "stop" or "save", or that the lock is "lost"."""
        now = time.monotonic()
        if self._watches and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            stop, save = is_file(self._stop_file), is_file(self._save_file)
            self._seen = {"stop": stop, "save": save, "lost": self._run.is_taken_over()}
        return self._seen[what]

    def is_saved(self) -> None:
        """Note that the last checkpoint is complete: from now on no signal ends this process early."""
        self._ending = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the stop signals into requests; a second Ctrl-C, after a moment, interrupts at once.

        After the block, a process that received a signal is about to end, and ignores further ones: they would change
        its exit status, which tells whether there is a checkpoint.
        """
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if self._signal is None else signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now, first = time.monotonic(), self._first_interrupt
        if number == signal.SIGINT and first is None:
            self._first_interrupt = now
        elif number == signal.SIGINT and now - first > _SAME_SECONDS and not self._ending:
            self._ending = True
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal = signal.Signals(number).name
            again = "; Ctrl-C again ends without one" if number == signal.SIGINT else ""
            _log.warning("%s: stopping after this step with a checkpoint%s", self._signal, again)

    def _remove_old_stop_file(self, clock_lead: float) -> None:
        """Remove a file STOP that is older than this command, and was for an earlier one.

        clock_lead: seconds by which the file system's clock is ahead.
        """
        with contextlib.suppress(FileNotFoundError):
            if patiently(self._stop_file.stat).st_mtime < _command_began() + clock_lead:
                self._stop_file.unlink()
                _log.info("%s: removed, as it was for an earlier start", self._stop_file)


def _command_began() -> float:
    """When the user gave the command that this process belongs to, in seconds since the epoch.

    For a process of a job it is 0, as the launcher removes the STOP of an earlier start when it submits.
    """
    if "SUBMITIT_EXECUTOR" in os.environ:
        return float("-inf")
    return time.time() - max(_age(pid) for pid in (os.getpid(), AGENT) if pid is not None)


def _age(pid: int) -> float:
    """Seconds since a process began; 0 where the system does not tell."""
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return uptime - ticks / os.sysconf("SC_CLK_TCK")
