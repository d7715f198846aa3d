"""Who trains in a run directory: one process at a time, by a lock that ends with the process."""

import json
import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from caduceus.errors import RetryError
from caduceus.files import is_locked, locked, read_json, take_lock, write_atomically
from caduceus.patience import patiently
from caduceus.run.agent import AGENT

ENDING_SECONDS = 10.0
"""Seconds that a start waits for the process before it, which may be ending: a killed one first gives back its memory.
"""
_PAUSE_SECONDS = 0.05
_QUIET_SECONDS = 1.0
"""Seconds of waiting after which a start logs that it waits."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The process that trains in a run directory, or trained in it last."""

    host: str
    pid: int
    slurm_job: str | None
    since: float
    """Seconds since the epoch."""
    machine: str | None = None
    """The boot and the PID namespace in which `pid` is valid. None where the system does not tell."""
    started: str | None = None
    """When the process began, in ticks since that boot: this distinguishes it from a later process with the same
    number.
    """
    agent: int | None = None
    """The torchrun that started the process, if one did."""

    @classmethod
    def of_this_process(cls) -> "Holder":
        pid = os.getpid()
        job = os.environ.get("SLURM_JOB_ID")
        return cls(socket.gethostname(), pid, job, time.time(), _this_machine(), _start_of(pid), AGENT)

    def is_dead(self) -> bool:
        """Whether it has certainly ended: it ran on this machine, and runs no more."""
        if self.machine is None or self.machine != _this_machine():
            return False
        return _start_of(self.pid) != self.started

    def is_orphan(self) -> bool:
        """Whether it is a rank whose torchrun is gone: it stops at its next step, with a checkpoint."""
        if self.agent is None or self.machine is None or self.machine != _this_machine():
            return False
        stat = _stat_of(self.pid)
        return stat is not None and int(stat[1]) != self.agent

    def __str__(self) -> str:
        job = f" of SLURM job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid}{job} on {self.host}"


class RunLock:
    """The lock of a run directory, and who holds it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / ".lock"
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._claim: str | None = None
        self.file_clock_lead = 0.0
        """Seconds by which the clock of the file system (it may be a server's) was ahead when the lock was taken."""

    def take(self) -> None:
        """Lock the directory for this process. Raises `RetryError` where another one trains in it and does not end.

        A process that is stopping because its torchrun is gone is waited for, however long its step takes.
        """
        began, told = time.monotonic(), False
        while self._file is None:
            with suppress(BlockingIOError):
                self._file = patiently(lambda: take_lock(self.path, wait=False))
                break
            holder = self.holder()
            if holder is not None and holder.is_dead():  # a process that it started still runs, and keeps its lock
                self._take_from_the_dead(holder)
                continue
            waited = time.monotonic() - began
            is_ending = holder is not None and holder.is_orphan()
            name = holder or "its name is not known"
            if waited > ENDING_SECONDS and not is_ending:
                raise RetryError(
                    f"run.dir: another process is training in {self._directory} ({name}); stop it or choose another"
                )
            if waited > _QUIET_SECONDS and not told:
                told = True
                why = ", which is stopping as its torchrun is gone" if is_ending else ""
                _log.info("%s: in use by another process (%s%s); waiting for it to end", self._directory, name, why)
            time.sleep(_PAUSE_SECONDS)
        self._claim = json.dumps(asdict(Holder.of_this_process()))
        self._file.truncate(0)
        self._file.write(self._claim.encode())
        self._file.flush()
        self.file_clock_lead = os.fstat(self._file.fileno()).st_mtime - time.time()

    def release(self) -> None:
        """Let another process take the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def is_held_elsewhere(self) -> bool:
        """Whether another process of this machine trains in the directory."""
        if self._file is not None or not is_locked(self.path):
            return False
        holder = self.holder()
        return holder is None or not holder.is_dead()

    def holder(self) -> Holder | None:
        """The process that holds the lock, or held it last; None where that is not known."""
        try:
            return Holder(**(read_json(self.path) or {}))
        except (OSError, TypeError):
            return None

    def shut_out_holder(self) -> None:
        """Free the lock for the next process, although the holder may still run where it cannot be reached."""
        write_atomically(self.path, b"")

    def is_lost(self) -> bool:
        """Whether this process, which took the lock, has lost it to another one."""
        if self._file is None:
            return False
        try:
            return patiently(self.path.read_text) != self._claim
        except OSError:  # a failing file system tells nothing
            return False

    def _take_from_the_dead(self, holder: Holder) -> None:
        with locked(self._directory / ".lock.guard"):  # of several starts, only one frees the lock, for all of them
            if self.holder() == holder:
                self.shut_out_holder()


def _this_machine() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return None


def _start_of(pid: int) -> str | None:
    """When a process of this machine began; None where there is none, or only a zombie that waits for its parent."""
    stat = _stat_of(pid)
    return None if stat is None or stat[0] in "ZX" else stat[19]


def _stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the process's name: state, parent, …; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
