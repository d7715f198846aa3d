"""A node's copy of shards that live elsewhere: fetched whole, ahead of need, shared by processes, bounded in size.

Imports no torch. A shard appears under its final name only when its size and sha256 are the manifest's. The processes
of a node agree through file locks, so the directory should be on a local disk. Over the limit, the shard that was
opened the longest ago goes first; a process that still reads it keeps its bytes until it closes the file.
"""

import errno
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from caduceus.data.remote import read_chunks
from caduceus.errors import UserError

log = logging.getLogger(__name__)

FETCH_WAITS = (1, 2, 4, 8)
"""Seconds between attempts to fetch a shard."""
_PREFETCH_THREADS = 2


@dataclass(frozen=True)
class Shard:
    """A file of a dataset: where it is read, what it must be, and where a cache fetches it from."""

    path: Path
    bytes: int
    sha256: str
    origin: str | None = None


class ShardCache:
    """Fetches shards into `directory`, at most `limit` bytes of them (0: no limit). Safe to pickle and to fork."""

    def __init__(self, directory: str | Path, limit: int = 0) -> None:
        self.directory = Path(directory)
        self.limit = limit
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {directory} cannot be made ({error.strerror})") from None

    def open(self, shard: Shard) -> int:
        """A descriptor of the shard, fetched first where it is absent. Raises OSError where it cannot be had."""
        while True:
            try:
                descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(shard)
                continue
            now = time.time_ns()  # the kernel's own time stamps are some milliseconds coarse
            os.utime(descriptor, ns=(now, now))
            return descriptor

    def fetch(self, shard: Shard) -> None:
        """Have the shard on disk. Raises OSError after several attempts."""
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(_lock_path(shard.path)):
            if shard.path.exists():
                return
            self._reserve(shard)
            for wait in (*FETCH_WAITS, None):
                try:
                    return _download(shard)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        _partial_path(shard.path).unlink(missing_ok=True)
                        raise UserError(
                            f"data.cache_dir: {self.directory} is full; lower data.cache_bytes or free some space"
                        ) from None
                    if wait is None:
                        _partial_path(shard.path).unlink(missing_ok=True)
                        raise
                    log.warning("data: %s; again in %d s", error, wait)
                    time.sleep(wait)

    def fetch_file(self, path: Path, origin: str, sha256: str) -> None:
        """Have a small file that belongs to the shards on disk; it does not count towards the limit."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(_lock_path(path)):
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return
            content = b"".join(read_chunks(origin))
            if hashlib.sha256(content).hexdigest() != sha256:
                raise OSError(f"{origin}: its sha256 is not the manifest's")
            partial = _partial_path(path)
            partial.write_bytes(content)
            partial.rename(path)

    def _reserve(self, shard: Shard) -> None:
        """Make room for a shard and take it: its partial file gets the full length at once."""
        if self.limit and shard.bytes > self.limit:
            raise UserError(f"data.cache_bytes: {self.limit} is less than the {shard.bytes} bytes of {shard.path.name}")
        partial = _partial_path(shard.path)
        while True:
            with _locked(self.directory / ".room.lock"):
                partial.unlink(missing_ok=True)  # of a process that was killed
                if not self.limit or self._evict(self.limit - shard.bytes):
                    with partial.open("wb") as file:
                        file.truncate(shard.bytes)
                    return
            time.sleep(0.2)  # the others' downloads fill the rest; when finished they can go

    def _evict(self, allowed: int) -> bool:
        """Remove shards, the longest unused first, until at most `allowed` bytes are left; whether that succeeded."""
        partials = list(self.directory.glob("*/*/.*.tar.partial"))
        _remove_abandoned(partials)
        sizes = {path: status for path in self.directory.glob("*/*/*.tar") if (status := _stat(path))}
        used = sum(status.st_size for path in partials if (status := _stat(path)))
        used += sum(status.st_size for status in sizes.values())
        for path in sorted(sizes, key=lambda path: sizes[path].st_mtime_ns):
            if used <= allowed:
                break
            path.unlink(missing_ok=True)
            used -= sizes[path].st_size
        return used <= allowed


class Prefetcher:
    """Fetches the shards that a process will need, in the background. What fails is left to the reader to report."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: list[Shard] = []
        self._changed = threading.Condition()
        for _ in range(_PREFETCH_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def want(self, shards: Sequence[Shard]) -> None:
        """Forget earlier wishes and fetch these in order, as many as half of the cache holds."""
        total, kept = 0, []
        for shard in shards:
            total += shard.bytes
            if self._cache.limit and kept and total > self._cache.limit / 2:
                break
            kept.append(shard)
        with self._changed:
            self._wanted = kept
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                shard = self._wanted.pop(0)
            try:
                os.close(self._cache.open(shard))
            except (OSError, UserError) as error:
                log.debug("data: prefetching %s: %s", shard.path, error)


def _download(shard: Shard) -> None:
    partial = _partial_path(shard.path)
    digest, size = hashlib.sha256(), 0
    with partial.open("r+b") as file:
        for chunk in read_chunks(shard.origin):
            digest.update(chunk)
            size += len(chunk)
            if size > shard.bytes:
                break
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if size != shard.bytes or digest.hexdigest() != shard.sha256:
        raise OSError(f"{shard.origin}: {size} bytes with sha256 {digest.hexdigest()[:12]}…, not the manifest's shard")
    partial.rename(shard.path)


def _remove_abandoned(partials: list[Path]) -> None:
    """Remove partial files whose process was killed: nobody holds their lock."""
    for partial in partials:
        final = partial.with_name(partial.name[1:].removesuffix(".partial"))
        with _lock_path(final).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            partial.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
