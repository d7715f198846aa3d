"""A run's counterpart at Weights & Biases, which never ends the run: metrics.jsonl has all that W&B is sent."""

import contextlib
import importlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caduceus.config import Config, config_to_dict
from caduceus.run.directory import RunDirectory

_TIMEOUT = 60.0
"""Seconds that W&B has to answer, on nodes that may have no network, before the run goes on offline."""

_log = logging.getLogger(__name__)


class WandbRun:
    """Sends rows to the W&B run `id`, or to a new one, whose id is then in that attribute.

    Its client talks to a process of its own, which anything that ends processes may end: SLURM's signals reach it as
    well. At the client's first error the run goes on without W&B, until its next start.
    """

    def __init__(self, config: Config, run: RunDirectory, wandb_id: str | None) -> None:
        self.id = wandb_id
        self._run: Any = None
        temporary = run.path / "wandb" / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of starts that were killed
        if config.wandb.mode == "disabled":
            return
        with self._guarded():
            _import_with_temporary_files_in(temporary)
            self._run = _start(config, run, wandb_id)
            self.id = self._run.id
            # A resumed run makes some steps again: their rows count by `step`, not by the order in which they arrive.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def log(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            with self._guarded():
                self._run.log(row)

    def finish(self, exit_code: int) -> None:
        if self._run is not None:
            with self._guarded():
                self._run.finish(exit_code=exit_code)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            _log.warning(
                "wandb: %s (%s); the run goes on without it, and metrics.jsonl has everything",
                type(error).__name__,
                " ".join(str(error).split()),
            )
            self._abandon()

    def _abandon(self) -> None:
        import wandb

        abandoned, self._run = self._run, None
        # Else the client would try again when the process exits, and print what it then meets.
        if abandoned is not None:
            with contextlib.suppress(Exception):
                abandoned.finish(exit_code=1)
        with contextlib.suppress(Exception):
            wandb.teardown(exit_code=1)


def _import_with_temporary_files_in(directory: Path) -> None:
    """Import the client, which makes folders for temporary files as it is imported, and removes them where it ends.

    In the system's own place nobody would remove those of a process that was killed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(directory.absolute())
    try:
        importlib.import_module("wandb")
    finally:
        tempfile.tempdir = before


def _start(config: Config, run: RunDirectory, wandb_id: str | None) -> Any:
    import wandb

    mode = config.wandb.mode
    if mode == "auto":
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        if mode == "offline":
            _log.info("wandb: not logged in, so the run is kept offline in %s/wandb; `wandb sync` sends it", run.path)
    settings = {
        "id": wandb_id,
        "resume": "allow",
        "name": config.run.name,
        "project": config.wandb.project,
        "entity": config.wandb.entity,
        "group": config.wandb.group,
        "tags": config.wandb.tags,
        "dir": run.path,
        "config": config_to_dict(config),
        "settings": wandb.Settings(silent=True, init_timeout=_TIMEOUT),
    }
    try:
        return wandb.init(mode=mode, **settings)
    except wandb.errors.CommError as error:
        _log.warning("wandb: no answer (%s); the run is kept offline and `wandb sync` sends it later", error)
        return wandb.init(mode="offline", **settings)
