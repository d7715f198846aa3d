"""Outlasts what passes on a network file system: errors of a moment, and files that this node sees late.

Imports no torch.
"""

import errno
import functools
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

_PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EREMOTEIO)
"""Errors that a network file system gives for a moment, and a broken disk every time."""
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors that say that there is nothing of this name."""
_PAUSES = (0.1, 1.0, 5.0, 5.0)
"""Seconds before each further attempt. There are several, as a file that appears late may at first fail as well."""

P = ParamSpec("P")
T = TypeVar("T")


def patiently(attempt: Callable[[], T], is_there: bool = False) -> T:
    """The result of `attempt()`, repeated after pauses while a network file system fails for a moment.

    ESTALE comes where another node replaced an open file, EIO and time-outs where a server fails over. `is_there`:
    another node has just written the file, so that it exists, though this node may not see it yet. The error that
    caused an exception counts as well. An error of a `patiently` within `attempt` is not tried again.
    """
    for pause in (*_PAUSES, None):
        try:
            return attempt()
        except Exception as error:
            cause = system_error(error)
            if cause is None or not (cause.errno in _PASSING or (is_there and isinstance(cause, FileNotFoundError))):
                raise
            if pause is None or getattr(cause, "was_patient", False):
                cause.was_patient = True  # type: ignore[attr-defined]
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def patient(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that may be called again after a failure: its calls go through `patiently`."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        return patiently(lambda: function(*arguments, **named))

    return call


def status(path: str | Path) -> os.stat_result | None:
    """What the file system says of a path; None where there is nothing."""
    try:
        return patiently(Path(path).stat)
    except ValueError:  # a NUL, which no name has
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def exists(path: str | Path) -> bool:
    """Whether there is anything. `Path.exists` raises an error that may pass, or answers False, by Python's release;
    this tries again, and raises what does not pass, as do the next two.
    """
    return status(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether there is a file."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_directory(path: str | Path) -> bool:
    """Whether there is a directory."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def listed(directory: Path, pattern: str | None = None) -> list[Path]:
    """The entries of a directory, sorted: those that match a pattern of `Path.glob`, or all. A directory that is
    absent has none that match, and raises FileNotFoundError where all are wanted.
    """
    return patiently(lambda: sorted(directory.iterdir() if pattern is None else directory.glob(pattern)))


def system_error(error: BaseException) -> OSError | None:
    """The system's error that caused an exception, as a full disk causes a library's complaint about an incomplete
    file.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen
