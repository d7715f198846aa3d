"""Run directories made ready for a submission, and put back as they were where nothing came of it."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from caduceus.config import Config
from caduceus.files import write_atomically
from caduceus.run.directory import RunDirectory
from launch.history import submissions


@contextlib.contextmanager
def prepared(configs: Sequence[Config], folder: Path) -> Iterator[list[RunDirectory]]:
    """The run directories of `configs`, with these configurations as their own and no wish to stop.

    Where the body raises, each run without a new submission is left as it was found, and so is `folder`, which holds
    them or is the only one.
    """
    new_folder = not folder.exists()
    found = []
    try:
        for config in configs:
            run = RunDirectory(config.run.dir)
            found.append(_Found.of(run))
            RunDirectory.create_or_resume(config).release()
            run.keep_config(config)
            run.stop_path.unlink(missing_ok=True)
        yield [state.run for state in found]
    except BaseException:
        unused = [state for state in found if len(submissions(state.run)) == state.submissions]
        for state in unused:
            state.restore()
        if new_folder and len(unused) == len(found):
            shutil.rmtree(folder, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Found:
    """A run directory before it was touched."""

    run: RunDirectory
    is_new: bool
    config: str | None
    stopped: bool
    submissions: int

    @classmethod
    def of(cls, run: RunDirectory) -> "_Found":
        config = run.config_path.read_text() if run.config_path.is_file() else None
        return cls(run, not run.path.exists(), config, run.stop_path.exists(), len(submissions(run)))

    def restore(self) -> None:
        if self.is_new:
            shutil.rmtree(self.run.path, ignore_errors=True)
            return
        if self.config is None:
            self.run.config_path.unlink(missing_ok=True)
        else:
            write_atomically(self.run.config_path, self.config.encode())
        if self.stopped:
            self.run.stop_path.touch()
