"""Random access to a file that must not change while it is read."""

import hashlib
import os
from pathlib import Path

from caduceus.errors import UserError
from caduceus.files import CHUNK
from caduceus.patience import patiently
from data_prep.progress import Progress


class PinnedFile:
    """`pread` on a file as it was when this object was made. Raises `UserError` where the file has changed since.

    Safe across fork and pickle: nothing depends on a file offset, and a descriptor never travels to another process.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        status = os.fstat(self._open())
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns

    def pread(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes from `offset`."""
        descriptor = self._descriptor if self._descriptor is not None else self._reopen()
        try:
            piece = os.pread(descriptor, count, offset)
            while len(piece) < count:  # the kernel may return less than asked, and never more than 2 GiB
                more = os.pread(descriptor, count - len(piece), offset + len(piece))
                if not more:
                    raise UserError(f"{self.path}: ends at byte {offset + len(piece)}; it was changed while in use")
                piece += more
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read at byte {offset} ({error.strerror})") from None
        return piece

    def check_unchanged(self) -> None:
        """Raise `UserError` where the file's size or time of change differs from that at the start."""
        descriptor = self._descriptor if self._descriptor is not None else self._open()
        self._require(os.fstat(descriptor))

    def require_same(self, path: Path) -> None:
        """Raise `UserError` where `path` is another file than this one, or has changed since."""
        self._require(patiently(path.stat))

    def _require(self, status: os.stat_result) -> None:
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise UserError(f"{self.path}: was changed while in use; run the command again")

    def _open(self) -> int:
        try:
            self._descriptor: int | None = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened ({error.strerror})") from None
        return self._descriptor

    def _reopen(self) -> int:
        descriptor = self._open()
        self.check_unchanged()
        return descriptor

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)


class SequentialReader:
    """Reads a pinned file from its beginning, keeps the sha256 of what was read, and reports bytes to `progress`."""

    def __init__(self, file: PinnedFile, progress: Progress) -> None:
        self._file, self._progress, self._hash = file, progress, hashlib.sha256()
        self.position = 0

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes, or the rest of the file where `count` is negative; empty at the end."""
        left = self._file.size - self.position
        piece = self._file.pread(self.position, left if count < 0 else min(count, left))
        self.position += len(piece)
        self._hash.update(piece)
        self._progress.add(len(piece))
        return piece

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` as far as the file goes, and return the number of bytes."""
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def sha256(self) -> str:
        """sha256 of the whole file, which must have been read to its end. Raises `UserError` where it changed
        meanwhile.
        """
        while self.read(CHUNK):
            pass
        self._file.check_unchanged()
        return self._hash.hexdigest()
