"""Prepares run directories for a submission, and restores them where the submission fails."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from caduceus.config import Config
from caduceus.errors import RetryError, UserError
from caduceus.files import take_lock, temporary_name, write_atomically
from caduceus.patience import exists, system_error
from caduceus.run.directory import RunDirectory
from launch.history import submissions
from launch.refusals import refuse_run_in_use

_LOCK_SECONDS = 60
"""Seconds that a submission waits for another one of the same run."""
_GLANCE_SECONDS = 2
"""Seconds for which another submission may disturb this one: by its look at the run, and by removing what it made."""


@contextlib.contextmanager
def prepared(configs: Sequence[Config], folder: Path) -> Iterator[list[RunDirectory]]:
    """A context with the run directories of `configs`: each holds its configuration, and no request to stop.

    Within it no other process submits these runs, and none of them is in use. Where the block raises, each run without
    a new submission is restored to what it was; `folder`, which holds them or is the only one, is removed where it is
    new and holds no run.
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
            if new_folder and exists(folder) and not any(folder.glob("**/config.yaml")):
                _remove(folder)
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
            _remove(self.run.path)
            return
        write_atomically(self.run.config_path, self.config.encode())
        if self.stopped:
            self.run.stop_path.touch()


def _locked(config: Config) -> _Found:
    """The run directory of `config`, made where it is absent, and locked against other submissions.

    A submission that waited for another one sees its result: a directory with a submission, or no directory.
    """
    assert config.run.dir is not None, "load_config gives a run its directory"
    began, disturbed = time.monotonic(), None
    while True:
        try:
            found = _lock_if_free(config, RunDirectory(config.run.dir))
        except UserError as error:
            is_passing = isinstance(error, RetryError) or isinstance(system_error(error), FileNotFoundError)
            disturbed = disturbed or time.monotonic()
            if not is_passing or time.monotonic() - disturbed > _GLANCE_SECONDS:
                raise
        else:
            disturbed = None
            if found is not None:
                return found
            if time.monotonic() - began > _LOCK_SECONDS:
                raise RetryError(f"run.dir: {config.run.dir} is being started by another process; wait for it")
        time.sleep(0.1)


def _lock_if_free(config: Config, run: RunDirectory) -> _Found | None:
    """The run directory, locked; None where another submission has the lock.

    Raises `RetryError` where another submission looks at it just now, or a process trains in it, and a `UserError` that
    a `FileNotFoundError` caused where a refused submission removes it meanwhile.
    """
    was_absent = not exists(run.path)
    try:
        RunDirectory.create_or_resume(config).release()
    except RetryError:
        raise
    except BaseException:
        if was_absent and not exists(run.config_path) and not run.is_in_use():
            _remove(run.path)
        raise
    with run.telling_of_disks():
        try:
            lock = take_lock(run.path / ".submitting", wait=False)
        except BlockingIOError:
            return None
        count, content = len(submissions(run)), run.config_path.read_text()
    return _Found(run, lock, was_absent and not count, content, exists(run.stop_path), count)


def _remove(directory: Path) -> None:
    """Remove a directory in one step for others, who would otherwise find a half of it."""
    leaving = temporary_name(directory)
    try:
        directory.rename(leaving)
    except OSError:
        leaving = directory
    shutil.rmtree(leaving, ignore_errors=True)
