"""One session of W&B's client for a run: begin, log, finish."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb

from caduceus.config import Config
from caduceus.monitor.wandb.artifacts import log_artifacts
from caduceus.monitor.wandb.facts import program_and_arguments
from caduceus.monitor.wandb.place import Place
from caduceus.monitor.windows import DRAWN, RECORD, folder_of, picture_name, windows_of
from caduceus.patience import exists, patiently
from caduceus.run.directory import RunDirectory

_INIT_SECONDS = 30.0
_SEND_SECONDS = 5.0
_DRAWING_SECONDS, _POLL_SECONDS = 20.0, 0.3
"""Seconds after a validation within which the drawings of its windows are waited for."""
_WINDOW_COLUMNS = ("species", "kind", "place", "contig", "start", "end", "strand", "loss", "accuracy")
_FLUSH_SECONDS = 2.0
"""Seconds between flushes of the client's own file to the disk: a kill loses what was not flushed."""


class IdTakenError(Exception):
    """W&B does not accept this id, as its run was deleted."""


def start_client() -> None:
    """Start the client's process, which runs until this one ends."""
    wandb.setup()


def _settings(trainer: int | None, program: str) -> wandb.Settings:
    """The client's settings; `trainer`: as in `Session`, `program`: as returned by `program_and_arguments`."""
    watching: dict[str, Any] = {"x_disable_stats": True} if trainer is None else {"x_stats_pid": trainer}
    return wandb.Settings(
        silent=True,
        init_timeout=_INIT_SECONDS,
        allow_val_change=True,
        console="wrap",
        console_multipart=True,
        x_file_stream_transmit_interval=_SEND_SECONDS,
        x_graphql_retry_max=3,  # if the server fails, another attempt follows later
        x_graphql_retry_wait_max_seconds=2.0,
        x_transaction_log_flush_interval=_FLUSH_SECONDS,
        disable_git=True,
        disable_code=True,
        program=program or None,
        **watching,
    )


@contextlib.contextmanager
def _called_with(arguments: list[str]) -> Iterator[None]:
    """A context in which the client, which reads sys.argv, sees these as the arguments of this process."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before


class Session:
    """W&B's client, between its start and its end."""

    def __init__(
        self,
        run: Path,
        place: Place,
        run_id: str,
        mode: str,
        config: dict[str, Any],
        trainer: int | None,
        back_to: int | None = None,
    ) -> None:
        """Begin or continue the W&B run `run_id`; `back_to`: a step after which W&B removes all steps.

        `trainer`: the process whose system metrics W&B shows; None shows none. Raises `IdTakenError`, and what the
        client raises where the server does not answer.
        """
        self._directory = run
        moment = {"resume": "allow", "id": run_id} if back_to is None else {"resume_from": f"{run_id}?_step={back_to}"}
        program, arguments = program_and_arguments(RunDirectory(run))
        try:
            with _called_with(arguments):
                self._run = wandb.init(
                    mode=mode,
                    project=place.project,
                    entity=place.entity,
                    group=place.group,
                    tags=place.tags or None,
                    name=place.name,
                    notes=place.notes,
                    job_type=place.job_type,
                    dir=place.directory,
                    config=config,
                    settings=_settings(trainer, program),
                    **moment,
                )
        except Exception as error:
            if "HTTP 409" in str(error) or "previously created and deleted" in str(error):
                raise IdTakenError(" ".join(str(error).split())) from None
            raise
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("train/loss", step_metric="step", summary="last")
        self._run.define_metric("valid/loss", step_metric="step", summary="min,last")
        self.url: str | None = self._run.url
        self.entity: str | None = self._run.entity

    def log(self, row: dict[str, Any], step: int) -> None:
        """Log a whole step; for a validation also a table of its worst and best windows, where these were kept."""
        if "valid/loss" in row and (windows := windows_of(self._directory, step)):
            with contextlib.suppress(Exception):  # W&B's client asks the server about tables; the row matters more
                self._run.log({**row, "valid/windows": self._table(windows, step)}, step=step, commit=True)
                return
        self._run.log(row, step=step, commit=True)

    def _table(self, windows: list[dict[str, Any]], step: int) -> wandb.Table:
        folder = folder_of(self._directory, step)
        while (
            not exists(folder / DRAWN) and time.time() - patiently((folder / RECORD).stat).st_mtime < _DRAWING_SECONDS
        ):
            time.sleep(_POLL_SECONDS)
        rows = []
        for window in windows:
            picture = folder / picture_name(window)
            drawn = wandb.Image(str(picture)) if exists(picture) else None
            rows.append([*(window.get(column) for column in _WINDOW_COLUMNS), drawn])
        return wandb.Table(columns=[*_WINDOW_COLUMNS, "picture"], data=rows)

    def leave_artifacts(self, directory: RunDirectory, config: Config, files: bool) -> str | None:
        """Send the artifacts, models as `files` or by reference. Returns what went wrong, or None."""
        try:
            log_artifacts(self._run, directory, config, files)
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            return f"wandb: the artifacts of wandb.artifacts and wandb.save_code could not be sent: {text}"
        return None

    def alert(self, title: str, text: str, level: str) -> None:
        self._run.alert(title, text, level=level)

    def finish(self, exit_code: int, preempting: bool, reason: str | None) -> None:
        """Send the rest and end; a run that stopped in order to be started again is `preempting`."""
        if reason:
            self._run.summary["ended"] = reason
        if preempting:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)
