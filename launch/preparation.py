"""Prepares run directories for a submission, and restores them where the submission fails."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from caduceus.config import Config
from caduceus.errors import RetryError
from caduceus.files import take_lock, write_atomically
from caduceus.patience import exists
from caduceus.run.directory import RunDirectory
from launch.history import submissions
from launch.refusals import refuse_run_in_use

_LOCK_SECONDS = 60
"""Seconds that a submission waits for another one of the same run."""
_GLANCE_SECONDS = 2
"""Seconds that a submission waits for the lock of training, which another submission holds for a moment."""


@contextlib.contextmanager
def prepared(configs: Sequence[Config], folder: Path) -> Iterator[list[RunDirectory]]:
    """A context with the run directories of `configs`: each holds its configuration, and no request to stop.

    Within it no other process submits these runs, and none of them is in use. Where the block raises, each run without
    a new submission is restored to what it was, and so is `folder`, which holds them or is the only one.
    """
    new_folder = not exists(folder)
    with contextlib.ExitStack() as locks:
        found: list[_Found] = []
        try:
            for config in configs:
                state = _locked(config)
                locks.enter_context(state.lock)
                found.append(state)
                refuse_run_in_use(state.run)
                state.run.keep_config(config)
                state.run.stop_path.unlink(missing_ok=True)
            yield [state.run for state in found]
        except BaseException:
            unused = [state for state in found if len(submissions(state.run)) == state.submissions]
            for state in unused:
                state.restore()
            if new_folder and len(unused) == len(found) and not any(folder.glob("**/submissions.json")):
                shutil.rmtree(folder, ignore_errors=True)
            raise


@dataclass(frozen=True)
class _Found:
    """A run directory as it was found, locked against other submissions."""

    run: RunDirectory
    lock: IO[bytes]
    is_new: bool
    config: str
    stopped: bool
    submissions: int

    def restore(self) -> None:
        if self.is_new:
            shutil.rmtree(self.run.path, ignore_errors=True)
            return
        write_atomically(self.run.config_path, self.config.encode())
        if self.stopped:
            self.run.stop_path.touch()


def _locked(config: Config) -> _Found:
    """The run directory of `config`, made where it is absent, and locked against other submissions.

    A submission that waited for another one sees its result: a directory with a submission, or no directory.
    """
    run = RunDirectory(config.run.dir)
    began = time.monotonic()
    while True:
        was_absent = not exists(run.path)
        try:
            RunDirectory.create_or_resume(config).release()
        except RetryError:  # another submission, which releases it soon, or a process that trains
            if time.monotonic() - began > _GLANCE_SECONDS:
                raise
            time.sleep(0.1)
            continue
        except BaseException:
            if was_absent and not exists(run.config_path) and not run.is_in_use():
                shutil.rmtree(run.path, ignore_errors=True)
            raise
        with run.telling_of_disks():
            lock = _lock_if_free(run.path / ".submitting")
        if lock is not None:
            break
        if time.monotonic() - began > _LOCK_SECONDS:
            raise RetryError(f"run.dir: {run.path} is being started by another process; wait for it")
        time.sleep(0.1)
    count = len(submissions(run))
    return _Found(run, lock, was_absent and not count, run.config_path.read_text(), exists(run.stop_path), count)


def _lock_if_free(path: Path) -> IO[bytes] | None:
    """The lock; None where another process holds it, or has just removed the directory."""
    try:
        return take_lock(path, wait=False)
    except (BlockingIOError, FileNotFoundError):
        return None
