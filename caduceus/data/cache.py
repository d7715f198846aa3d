"""A node's local copies of remote shards: fetched whole and in advance, shared by processes, bounded in size.

Imports no torch. A shard appears under its final name only when its size and sha256 match the manifest. The processes
of a node coordinate through file locks, so the directory should be on a local disk. Over the limit, the shard that was
opened the longest ago is removed first; a process that still reads it keeps its bytes until it closes the file.
Failures are noted in files beside the shards, so that the processes of the node do not ask for the same shard again and
again.
"""

import hashlib
import logging
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from caduceus.data.remote import RefusalError, RemoteError, read_chunks
from caduceus.errors import RetryError, UserError
from caduceus.files import is_disk_full, locked, write_atomically
from caduceus.patience import exists, listed, patiently

log = logging.getLogger(__name__)

FETCH_WAITS = (1, 2, 4, 8, 15, 15)
"""Seconds between attempts to fetch a file."""
FETCH_PATIENCE = 45
"""Seconds after the first failure until which further attempts may begin: with a silent server each attempt takes long.
"""
FAILURE_REMEMBERED = 300
"""Seconds for which a shard that was not available is not asked for again. A file that was restored meanwhile is found
after that, so which samples are replaced depends on what can be read, not on failures of long ago.
"""
_PREFETCH_THREADS = 2

T = TypeVar("T")


class UnavailableError(OSError):
    """A shard was not available after all attempts: asking again at once does not help."""


@dataclass(frozen=True)
class Shard:
    """A file of a dataset: its path, its expected size and sha256, and the address from which a cache fetches it."""

    path: Path
    bytes: int
    sha256: str
    origin: str | None = None


class ShardCache:
    """Fetches shards into `directory`, at most `limit` bytes of them (0: no limit). Safe to pickle and to fork."""

    def __init__(self, directory: str | Path, limit: int = 0) -> None:
        self.directory = Path(directory)
        self.limit = limit
        self._made = time.time()
        self._unreachable: dict[Path, tuple[Path, float]] = {}
        self._server_down: str | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {directory} cannot be made ({error.strerror})") from None

    def open(self, shard: Shard) -> int:
        """A file descriptor of the shard, which is fetched first where it is absent. Raises what `fetch` raises."""
        while True:
            try:
                descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(shard)
                continue
            _touch(descriptor)
            return descriptor

    def has_checked(self, shard: Shard) -> bool:
        """Whether a process of this node has compared the copy's sha256 with the manifest since the start, and found it
        equal.
        """
        lock = _stat(_lock_path(shard.path))
        return lock is not None and lock.st_mtime_ns >= self._made * 1e9

    def fetch(self, shard: Shard, *, wait: bool = True) -> None:
        """Fetch the shard unless it is on disk.

        Raises `BlockingIOError` where another process is fetching it and `wait` is False, and `UnavailableError` where
        it is not available. Raises `RetryError` where the server seems to be down: it is not reached for one shard
        after several attempts, and then not for another one either.
        """
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(_lock_path(shard.path), wait=wait):
            if exists(shard.path):
                return
            self._require_no_recent_failure(shard)
            self._reserve(shard)
            try:
                _persistently(lambda: _download(shard), () if self._suspect(shard) else FETCH_WAITS)
            except OSError as error:
                _partial_path(shard.path).unlink(missing_ok=True)
                if is_disk_full(error):
                    raise UserError(
                        f"data.cache_dir: {self.directory} is full; lower data.cache_bytes or free some space"
                    ) from None
                _failure_path(shard.path).write_text(str(error))
                self._judge_server(shard, error)
                raise UnavailableError(str(error)) from error
            _failure_path(shard.path).unlink(missing_ok=True)
            self._unreachable.pop(_dataset(shard), None)

    def fetch_file(self, path: Path, origin: str, sha256: str) -> None:
        """Fetch a small file that belongs to the shards, unless it is on disk; it does not count towards the limit."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(_lock_path(path)):
            if exists(path) and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return
            content = _persistently(lambda: b"".join(read_chunks(origin)), FETCH_WAITS)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise OSError(f"{origin}: its sha256 is not the manifest's")
            write_atomically(path, content)

    def _require_no_recent_failure(self, shard: Shard) -> None:
        """Raise `UnavailableError` for a shard that a process of this run on this node failed to fetch a short while
        ago.
        """
        if self._server_down:
            raise RetryError(self._server_down)
        note = _failure_path(shard.path)
        status = _stat(note)
        # A note from before this start does not count: a user who has mended the shard and starts again wants it read.
        if status and status.st_mtime >= max(self._made, time.time() - FAILURE_REMEMBERED):
            raise UnavailableError(note.read_text())

    def _suspect(self, shard: Shard) -> bool:
        """Whether the server was not reached for another shard of the dataset, and has not been reached since."""
        other, when = self._unreachable.get(_dataset(shard), (shard.path, 0))
        return other != shard.path and time.monotonic() - when < FAILURE_REMEMBERED

    def _judge_server(self, shard: Shard, error: OSError) -> None:
        """Raise `RetryError` where the server fails for a second shard: one shard may be replaced, but with a server
        that is down all would fail.
        """
        if not isinstance(error, RemoteError) or isinstance(error, RefusalError):
            self._unreachable.pop(_dataset(shard), None)  # it did answer
        elif self._suspect(shard):
            other, _ = self._unreachable[_dataset(shard)]
            self._server_down = (
                f"{error}; {other.name} could not be fetched either; start again when the server can be reached"
            )
            raise RetryError(self._server_down) from None
        else:
            self._unreachable[_dataset(shard)] = shard.path, time.monotonic()

    def _reserve(self, shard: Shard) -> None:
        """Make room for a shard and reserve it: the partial file gets the full length at once."""
        if self.limit and shard.bytes > self.limit:
            raise UserError(f"data.cache_bytes: {self.limit} is less than the {shard.bytes} bytes of {shard.path.name}")
        partial = _partial_path(shard.path)
        while True:
            with locked(self.directory / ".room.lock"):
                partial.unlink(missing_ok=True)  # left by a process that was killed
                if not self.limit or self._evict(self.limit - shard.bytes):
                    with partial.open("wb") as file:
                        file.truncate(shard.bytes)
                    return
            time.sleep(0.2)  # downloads of other processes fill the rest; once finished they can be removed

    def _evict(self, allowed: int) -> bool:
        """Remove shards, the longest unused first, until at most `allowed` bytes are left. Returns whether that
        succeeded.
        """
        partials = listed(self.directory, "*/*/.*.tar.partial")
        _remove_abandoned(partials)
        # List partial files first: one that is finished meanwhile is then counted twice rather than left out.
        used = sum(status.st_size for path in partials if (status := _stat(path)))
        sizes = {path: status for path in listed(self.directory, "*/*/*.tar") if (status := _stat(path))}
        used += sum(status.st_size for status in sizes.values())
        for path in sorted(sizes, key=lambda path: sizes[path].st_mtime_ns):
            if used <= allowed:
                break
            path.unlink(missing_ok=True)
            used -= sizes[path].st_size
        return used <= allowed


class _Wish(NamedTuple):
    """A shard, and the number of the sample for which it will have to be fetched."""

    shard: Shard
    sample: int


class Prefetcher:
    """Fetches the shards that a process will need, in order of need, in the background.

    One half of the cache is for shards that are being read, the other for shards that were fetched and not yet read.
    Where the second half is full, fetching pauses until reading advances. Failures are left to the reader to report.
    """

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._share = cache.limit / 2 if cache.limit else math.inf
        self._in_use: OrderedDict[Path, int] = OrderedDict()
        """Bytes of the shards that the half for reading will hold after the last planned sample."""
        self._in_use_bytes = 0
        self._wishes: deque[_Wish] = deque()
        self._ahead: list[_Wish] = []
        """Fetched, or being fetched, and not yet read from."""
        self._reached = 0
        self._changed = threading.Condition()
        for _ in range(_PREFETCH_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def want(self, shards: Sequence[Shard], first: int) -> None:
        """Fetch the shards of the samples number `first`, `first` + 1, …, one for each, after those of earlier
        samples.
        """
        with self._changed:
            for sample, shard in enumerate(shards, start=first):
                if shard.path in self._in_use:
                    self._in_use.move_to_end(shard.path)
                    continue
                self._wishes.append(_Wish(shard, sample))
                self._in_use[shard.path] = shard.bytes
                self._in_use_bytes += shard.bytes
                while self._in_use_bytes > self._share and len(self._in_use) > 1:
                    self._in_use_bytes -= self._in_use.popitem(last=False)[1]
            self._changed.notify_all()

    def advance(self, sample: int) -> None:
        """Note that all samples before `sample` have been read, so that their shards may be removed before
        those ahead.
        """
        with self._changed:
            self._reached = sample
            if self._ahead and self._ahead[0].sample < sample:
                self._ahead = [wish for wish in self._ahead if wish.sample >= sample]
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while (shard := self._next()) is None:
                    self._changed.wait()
            try:
                if not _touch(shard.path):
                    self._cache.fetch(shard, wait=False)
            except (OSError, UserError) as error:  # BlockingIOError included: another process is fetching it
                log.debug("data: prefetching %s: %s", shard.path, error)

    def _next(self) -> Shard | None:
        """The shard to fetch now; None where there is none, or no room for it."""
        if not self._wishes:
            return None
        wish = self._wishes[0]
        ahead = sum(other.shard.bytes for other in self._ahead)
        if self._ahead and ahead + wish.shard.bytes > self._share:
            return None
        if wish.sample >= self._reached:
            self._ahead.append(wish)
        return self._wishes.popleft().shard


def _persistently(attempt: Callable[[], T], waits: Sequence[float]) -> T:
    """The result of `attempt()`, tried again after each of `waits` unless a failure is final."""
    deadline = None
    for wait in (*waits, None):
        try:
            return attempt()
        except OSError as error:
            deadline = deadline or time.monotonic() + FETCH_PATIENCE
            is_final = isinstance(error, RefusalError) or is_disk_full(error)
            if is_final or wait is None or time.monotonic() + wait > deadline:
                raise
            log.warning("data: %s; again in %d s", error, wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


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
        raise OSError(
            f"{shard.origin}: {size} bytes with sha256 {digest.hexdigest()[:12]}… are not the shard of the manifest"
        )
    _touch(_lock_path(shard.path))  # `has_checked` looks at this time; what becomes of the file later is not checked
    partial.rename(shard.path)


def _remove_abandoned(partials: list[Path]) -> None:
    """Remove partial files of killed processes: their lock is free."""
    for partial in partials:
        final = partial.with_name(partial.name[1:].removesuffix(".partial"))
        with suppress(BlockingIOError), locked(_lock_path(final), wait=False):
            partial.unlink(missing_ok=True)


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _failure_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.failure")


def _dataset(shard: Shard) -> Path:
    """The folder of the cache that keeps the shard's dataset; a dataset lies on one server."""
    return shard.path.parents[1]


def _touch(file: Path | int) -> bool:
    """Set the time of a file to now. Returns whether the file exists."""
    now = time.time_ns()  # the kernel's own time stamps are coarse: several milliseconds
    try:
        os.utime(file, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


def _stat(path: Path) -> os.stat_result | None:
    try:
        return patiently(path.stat)
    except FileNotFoundError:
        return None
