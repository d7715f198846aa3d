"""Stopping at a step boundary: Ctrl-C, the signals of schedulers, a budget of time, and the files STOP and SAVE."""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from caduceus.files import is_file, patiently
from caduceus.run.agent import AGENT, agent_is_gone
from caduceus.run.directory import RunDirectory

EXIT_REQUEUE = 75
"""Exit status of a run that stopped early with a checkpoint (EX_TEMPFAIL): start the same command again."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_LOOK_SECONDS = 1.0
"""Time between looks at the files of the run, which on a shared file system take longer than a short step should."""
_SAME_SECONDS = 1.0
"""Ctrl-C again within this is the same wish: torchrun passes on what the terminal has sent already."""

_log = logging.getLogger(__name__)


class StopRequest:
    """Collects requests to stop or save on one rank; the training loop asks at every step boundary.

    A signal reaches one rank or all, and so does the end of their torchrun; only the main rank `watches` the files and
    the clock, `budget` seconds of it from the beginning of the monotonic time `started` (0: no limit).
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
        """Whether a stop signal came, torchrun is gone, someone touched the file STOP, or the time is up."""
        if not self._is_orphan and agent_is_gone():
            self._is_orphan = True
            _log.warning("torchrun, which started this rank, is gone: stopping after this step with a checkpoint")
        return (
            self._signal is not None
            or self._is_orphan
            or (self._watches and (self._sees("stop") or time.monotonic() >= self._end))
        )

    def save_requested(self) -> bool:
        """Whether someone touched the file SAVE since the last time asked."""
        if not self._sees("save"):
            return False
        self._seen["save"] = False
        self._save_file.unlink(missing_ok=True)
        return True

    def taken_over(self) -> bool:
        """Whether another process has taken the run directory from this rank, which took it."""
        return self._sees("lost")

    def _sees(self, what: str) -> bool:
        """What the last look at the files found: "stop" and "save", if they are there, and if the lock is "lost"."""
        now = time.monotonic()
        if self._watches and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            stop, save = is_file(self._stop_file), is_file(self._save_file)
            self._seen = {"stop": stop, "save": save, "lost": self._run.is_taken_over()}
        return self._seen[what]

    def is_saved(self) -> None:
        """Tell that the last checkpoint is complete: from now on no signal ends this process before its own end."""
        self._ending = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the stop signals into requests; a second Ctrl-C, after a moment, interrupts at once.

        Where a signal came, the process is about to end, and ignores further ones from here on: they would change its
        exit status, which tells whether there is a checkpoint.
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
        """Remove a STOP that is older than this command, and stopped an earlier one; the clock of files has a lead."""
        with contextlib.suppress(FileNotFoundError):
            if patiently(self._stop_file.stat).st_mtime < _command_began() + clock_lead:
                self._stop_file.unlink()
                _log.info("%s: of an earlier start, removed", self._stop_file)


def _command_began() -> float:
    """When the user gave the command that this process is of, in seconds since the epoch.

    For a job's processes it is the beginning of time, as the launcher removes the STOP of an earlier start when it
    submits.
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
