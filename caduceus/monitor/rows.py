"""Where people watch a run: metrics.jsonl, the console, Weights & Biases."""

import json
import logging
import math
import sys
import time
from typing import Any

from rich.console import Console

from caduceus.config import Config
from caduceus.monitor.wandb.process import WandbProcess
from caduceus.run.directory import RunDirectory

_QUIET_SECONDS = 30.0
"""Pause between progress lines when nobody watches a terminal."""
_TERMINAL_SECONDS = 0.2

_log = logging.getLogger(__name__)


class Monitor:
    """Writes every row to metrics.jsonl, a progress line to the console, and the row to W&B.

    Use as a context manager. Only one rank is `active`; the others' monitors do nothing.
    """

    def __init__(self, config: Config, run: RunDirectory, active: bool) -> None:
        self._config = config
        self._active = active
        self.stopped = False
        """Whether the run ends before its last step, to be started again."""
        if not active:
            return
        self._run = run
        self._file = run.metrics_path.open("ab", buffering=0)
        self._unwritten = b""
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._terminal = sys.stderr.isatty()
        self._last_line = 0.0
        self._started = time.monotonic()
        self._first_step: int | None = None
        self._wandb = WandbProcess(config, run.path)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._active:
            return
        self._file.close()
        if self._terminal:
            self._console.print()
        reason = f"{type(exception[1]).__name__}: {exception[1]}" if exception[1] else None
        self._wandb.end(1 if exception[0] else 0, self.stopped, reason)

    def log_training(self, row: dict[str, Any]) -> None:
        """Record a training row and show progress now and then."""
        if not self._active:
            return
        self._record(row)
        if self._first_step is None:
            self._first_step = row["step"] - 1
        pause = _TERMINAL_SECONDS if self._terminal else _QUIET_SECONDS
        last = row["step"] == self._config.train.steps
        if time.monotonic() - self._last_line >= pause or last:
            self._last_line = time.monotonic()
            self._show(self._progress_line(row), stay=last)

    def log_validation(self, row: dict[str, Any]) -> None:
        """Record and show a validation row."""
        if not self._active:
            return
        self._record(row)
        species = [f"{key.split('/')[1]} {value:.4f}" for key, value in row.items() if key.startswith("valid_loss/")]
        detail = f"  ({', '.join(species)})" if 1 < len(species) <= 8 else ""
        self._show(f"step {row['step']:,}  [bold]valid loss {row['valid_loss']:.4f}[/]{detail}", stay=True)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step` from metrics.jsonl: they are about to be made again."""
        if not self._active:
            return
        self._file.close()
        self._run.truncate_metrics(step)
        self._file = self._run.metrics_path.open("ab", buffering=0)

    def _record(self, row: dict[str, Any]) -> None:
        # JSON knows no NaN.
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._unwritten += (json.dumps(finite) + "\n").encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:  # a full disk: the next checkpoint ends the run, unless there is room again by then
            _log.warning("%s: %s; its last rows wait in memory", self._file.name, error.strerror)

    def _progress_line(self, row: dict[str, Any]) -> str:
        steps, done = self._config.train.steps, row["step"]
        elapsed = time.monotonic() - self._started
        left = elapsed / (done - self._first_step) * (steps - done)
        return (
            f"step {done:,}/{steps:,}  [bold]loss {row['loss']:.4f}[/]  lr {row['lr']:.2e}  "
            f"grad norm {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} bases/s  "
            f"{_clock(elapsed)} passed, {_clock(left)} left"
        )

    def _show(self, line: str, stay: bool) -> None:
        self._console.print(
            f"\r\x1b[2K{line}" if self._terminal else line, end="\n" if stay or not self._terminal else ""
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
