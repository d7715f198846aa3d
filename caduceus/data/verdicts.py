"""Which windows match their crc32, checked once for all processes of a node. Imports no torch.

Otherwise each rank of a node and each of its workers would have to read every window whole. They share a file in memory
with a byte per window. The file lives as long as one of the processes: the next start checks again.
"""

import fcntl
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.files import fingerprint

_MEMORY = Path("/dev/shm")


class Verdicts:
    """Verdicts on `windows` windows, of the data that `subject` (plain values) identifies. Safe to pickle and to fork.

    Attributes: `sound` (W,) bool. A process may set it, and all processes of this user on this node with the same
    subject see that. Where the node has no place for a shared file, each process checks for itself.
    """

    def __init__(self, subject: Any, windows: int) -> None:
        self._subject, self._windows = subject, windows
        self._descriptor: int | None = None
        try:
            self.sound = self._shared()
        except OSError:
            self.sound = np.zeros(windows, bool)

    @contextmanager
    def deciding(self, window: int) -> Iterator[None]:
        """A context in which no other process decides about this window; look first whether one has done so."""
        if self._descriptor is None:
            yield
            return
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, window)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, window)

    def _shared(self) -> np.ndarray:
        folder = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        path = folder / f"caduceus-{os.getuid()}-{fingerprint([self._subject, self._windows])[:24]}.sound"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(descriptor).st_uid != os.getuid():
                raise PermissionError(f"{path} is another user's")
            with suppress(BlockingIOError):  # it fails where other processes use the file
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)
                os.ftruncate(descriptor, self._windows)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            shared = mmap.mmap(descriptor, self._windows)
        except (OSError, ValueError) as error:  # ValueError: the file is shorter
            os.close(descriptor)
            raise OSError(str(error)) from error
        self._descriptor = descriptor
        weakref.finalize(self, _release, descriptor, path, os.getpid())
        return np.frombuffer(shared, bool)

    def __getstate__(self) -> dict[str, Any]:
        return {"subject": self._subject, "windows": self._windows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def _release(descriptor: int, path: Path, owner: int) -> None:
    if os.getpid() == owner:
        with suppress(OSError):  # the lock fails where other processes use the file
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    os.close(descriptor)
