"""Files that are whole or absent: atomic writes, fsync, sha256, locks, JSON. Imports no torch."""

import errno
import fcntl
import filecmp
import hashlib
import json
import math
import os
import secrets
import shutil
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from caduceus.patience import exists, is_directory, patient, patiently

CHUNK = 4 << 20
"""Bytes read at a time when a whole file is read."""


@patient
def write_atomically(path: str | Path, content: bytes) -> None:
    """Write under a temporary name, fsync and rename, so that a reader sees all of it or nothing."""

    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: str | Path, buffering: int = -1) -> Iterator[IO[bytes]]:
    """A file to write, which becomes `path` at the end of the block. Where the block raises, no file is left."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb", buffering=buffering) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def keep_first(new: Path, path: Path) -> None:
    """Give the finished file `new` the name `path`, unless a file of the same bytes has it: then that one stays.

    Several processes may make the same file at once, and one may already read it while another finishes. Afterwards
    `new` is gone.
    """
    with suppress(OSError):  # it exists already, or the file system has no hard links
        os.link(new, path)
    try:
        is_there = new.samefile(path) or filecmp.cmp(new, path, shallow=False)
    except FileNotFoundError:
        is_there = False
    if is_there:
        new.unlink()
    else:
        new.replace(path)
    sync(path.parent)


@contextmanager
def replacing_directory(path: str | Path) -> Iterator[Path]:
    """A new directory to fill, which takes the place of `path` at the end of the block.

    Where the block raises, no temporary file is left, and `path` is as it was.
    """
    path = Path(path)
    new, old = temporary_name(path), temporary_name(path)
    try:
        new.mkdir(parents=True)
        yield new
        for inner in new.rglob("*"):
            sync(inner)
        sync(new)
        if is_directory(path):
            path.rename(old)
        new.rename(path)
    except BaseException:
        if is_directory(old) and not exists(path):
            old.rename(path)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk itself (fsync)."""
    descriptor = patiently(lambda: os.open(path, os.O_RDONLY), is_there=True)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: OSError) -> bool:
    """Whether there is no room: on the disk, in the user's quota, or because a file may not grow further."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def show_bytes(count: float) -> str:
    """Bytes as people read them, such as `1.5 GiB`: in the largest unit that gives at least 1."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {units[power]}" if power == 0 or count >= 100 else f"{count:.1f} {units[power]}"


@patient
def sha256_of(path: str | Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(values: Any) -> str:
    """sha256 of the canonical JSON of plain values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def dump_json(values: Any) -> bytes:
    """JSON as this project writes it: indented, sorted, with a final newline, and null for NaN and infinity."""
    return (json.dumps(without_nan(values), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def without_nan(values: Any) -> Any:
    """Nested lists and dicts with None in place of the numbers that JSON does not have: NaN and infinities."""
    if isinstance(values, dict):
        return {key: without_nan(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


@patient
def append_json_line(path: str | Path, row: dict[str, Any]) -> None:
    """Append a row to a file of JSON lines in one write. It gets its own line, even where a kill cut the last line
    short.
    """
    with Path(path).open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        is_cut = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * is_cut + json.dumps(row).encode() + b"\n")


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none where it is absent.

    A line that a kill cut short, or that two writers on a shared file system spoiled, is left out.
    """
    try:
        content = patiently(Path(path).read_bytes)
    except FileNotFoundError:
        return []
    rows = []
    for line in content.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; None where the file is absent or is not JSON."""
    try:
        return json.loads(patiently(Path(path).read_bytes))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def take_lock(path: str | Path, *, wait: bool = True) -> IO[bytes]:
    """Lock the file `path`, made where it is absent, until the returned file is closed or this process ends.

    A forked child does not hold the lock. Raises `BlockingIOError` where another process holds it and `wait` is False,
    and another `OSError` where the file system has no locks.
    """
    path = Path(path)
    while True:
        file = _open_to_lock(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if is_open_as(file, path):
                return file
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "its holder has just replaced or removed it", str(path))
        except BaseException:
            file.close()
            raise
        file.close()


@patient
def _open_to_lock(path: Path) -> IO[bytes]:
    with _opening:
        file = path.open("ab")
        _locks.add(file)
    return file


@contextmanager
def locked(path: str | Path, *, wait: bool = True) -> Iterator[IO[bytes]]:
    """Hold the lock `path` within the block, as `take_lock` does."""
    with take_lock(path, wait=wait) as file:
        yield file


@patient
def is_locked(path: str | Path) -> bool:
    """Whether a process of this machine holds the lock `path`."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def is_open_as(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one at `path`: neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), patiently(path.stat))
    except FileNotFoundError:
        return False


def temporary_name(path: Path) -> Path:
    """A name beside `path`, `.NAME.….tmp`, that no other process has. It is random, as process ids recur on other
    nodes.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


_locks: "weakref.WeakSet[IO[bytes]]" = weakref.WeakSet()
"""Files that this process has locked or waits to lock: a lock belongs to all processes that have the file open."""
_opening = threading.Lock()
"""Held while a file of `_locks` is opened and while the process forks, so that a child knows all of them."""


def _leave_locks_to_parent() -> None:
    """Release the parent's locks in a forked process, which would otherwise hold them after the parent's end.

    The descriptors stay valid, so that closing or flushing these files later in this process does no harm.
    """
    _opening.release()
    held = [file.fileno() for file in _locks if not file.closed]
    if held:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in held:
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
    _locks.clear()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_leave_locks_to_parent)
