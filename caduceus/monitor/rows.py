"""The rows of a run: they go to metrics.jsonl, and from there to the terminal and to Weights & Biases."""

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from caduceus.config import Config, Stage
from caduceus.monitor.report.write import report_of_finished
from caduceus.monitor.terminal import Terminal
from caduceus.monitor.view import BEST, View, clock
from caduceus.monitor.wandb.identity import status
from caduceus.monitor.wandb.process import WandbProcess
from caduceus.monitor.windows import Drawing
from caduceus.patience import patiently
from caduceus.run.directory import RunDirectory
from caduceus.run.events import record_event

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0
"""Seconds between two checks of the run's lock: no other process takes over the lock of one that was frozen for less.
"""


class Monitor:
    """Writes every row to metrics.jsonl, shows it, and lets W&B be sent to it.

    Use it as a context manager. Only one rank is `active`; the monitors of others do nothing. shown: whether it also
    shows the run in the terminal.
    """

    def __init__(self, config: Config, run: RunDirectory, active: bool, shown: bool = True) -> None:
        self._config = config
        self._active = active
        self.stopped = False
        """Whether the run stops before its last step, to be started again."""
        if not active:
            return
        self._run = run
        self._started = time.monotonic()
        self.wandb = WandbProcess(config, run.path)
        self._file = patiently(partial(run.metrics_path.open, "ab", buffering=0))
        self._drawing = Drawing(run.path)
        self._unwritten = b""
        self._looked, self._is_lost = time.monotonic(), False
        self._view = View.of(run, config.run.name or run.path.name, config)
        self._recall()
        self._skipped = self._view.row.get("skipped_steps", 0)
        self._terminal, self._is_shown = Terminal(self._view, shown), shown
        restarts = {"requeues": int(count)} if (count := os.environ.get("SLURM_RESTART_COUNT", "")).isdigit() else {}
        record_event(run.path, "start", self._view.step, number=len(run.starts()), **restarts)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._active:
            return
        self._file.close()
        self._terminal.close()
        self._drawing.end(wait=not exception[0])
        reason = f"{type(exception[1]).__name__}: {exception[1]}" if exception[1] else None
        kind = "failed" if exception[0] else "stopped" if self.stopped else "finished"
        record_event(self._run.path, kind, self._view.step, **({"reason": reason} if reason else {}))
        done = not exception[0] and not self.stopped and self._config.monitor.report
        report = report_of_finished(self._run.path) if done else None
        self.wandb.end(1 if exception[0] else 0, self.stopped, reason)
        if not exception[0] and self._is_shown:
            self._summarise(report)

    def log_training(self, row: dict[str, Any]) -> None:
        """Record a training row, and show progress from time to time."""
        if not self._active:
            return
        self._record(row)
        if row.get("skipped_steps", 0) > self._skipped:
            self._skipped = row["skipped_steps"]
            record_event(self._run.path, "skipped", row["step"], loss=str(row["loss"]), grad_norm=str(row["grad_norm"]))
        self._terminal.refresh(last=row["step"] == self._config.train.steps)

    def log_validation(self, row: dict[str, Any], windows: Sequence[dict[str, Any]] = ()) -> None:
        """Record and show a validation row, and draw its worst and best windows."""
        if not self._active:
            return
        if windows:
            self._drawing.keep(row["step"], list(windows))
        self._record({**row, **self._best(row)})
        species = [f"{key.split('/')[1]} {value:.4f}" for key, value in row.items() if key.startswith("valid_loss/")]
        detail = f"  ({', '.join(species)})" if 1 < len(species) <= 8 else ""
        self._terminal.tell_validation(f"step {row['step']:,}  valid loss {row['valid_loss']:.4f}{detail}")

    def tell_best(self, step: int, facts: dict[str, Any]) -> None:
        """Show a line: this step is the best so far by `checkpoint.best`."""
        if self._active:
            self._terminal.tell_validation(f"step {step:,}  {facts['metric']} {facts['value']:.6g} is the best so far")

    def log_machines(self, row: dict[str, Any]) -> None:
        """Record a row about nodes and GPUs."""
        if self._active:
            self._record(row)

    def begin_stage(self, stage: Stage) -> None:
        """Note that a further stage of `train.stages` begins."""
        if not self._active:
            return
        record_event(self._run.path, "stage", self._view.step, number=stage.number, seq_len=stage.config.data.seq_len)
        self._view.begin_start()

    def log_evaluation(self, row: dict[str, Any]) -> None:
        """Record and show the numbers of an evaluation, `evaluated`."""
        if not self._active:
            return
        self._record(row)
        of = f"eval/{row['evaluated']}/"
        numbers = {key.removeprefix(of): value for key, value in row.items() if key.startswith(of)}
        seconds = numbers.pop("seconds")
        shown = ", ".join(f"{key} {value:.4f}" for key, value in list(numbers.items())[:6] if isinstance(value, float))
        self._terminal.tell_validation(f"step {row['step']:,}  {row['evaluated']}: {shown or 'done'} ({seconds:.1f} s)")

    def rewind(self, step: int) -> None:
        """Drop the rows after `step` from metrics.jsonl, which are about to be made again."""
        if not self._active:
            return
        self._file.close()
        record_event(self._run.path, "rewind", step, after=self._view.step)
        self._run.truncate_metrics(step)
        self._file = patiently(partial(self._run.metrics_path.open, "ab", buffering=0))
        self._recall()

    def _recall(self) -> None:
        """Show the state that earlier starts had reached."""
        self._view.recall()
        self._view.begin_start()

    def _best(self, row: dict[str, Any]) -> dict[str, Any]:
        """Entries with the best validation up to this one, so that the next start finds it without reading all rows."""
        before, loss = self._view.best_valid, row["valid_loss"]
        best = (row["step"], loss) if math.isfinite(loss) and (before is None or loss < before[1]) else before
        return {} if best is None else {"best_step": best[0], BEST: best[1]}

    def _record(self, row: dict[str, Any]) -> None:
        if self._has_lost_its_run():
            return
        # JSON has no NaN.
        finite = {key: value if isinstance(value, str) or math.isfinite(value) else None for key, value in row.items()}
        self._view.take(finite, time.monotonic())
        if "loss" in row and (left := self._view.seconds_left) is not None:
            finite["seconds_left"] = round(left)
        self._unwritten += (json.dumps(finite) + "\n").encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:  # a full disk: the next checkpoint ends the run, unless there is room again by then
            _log.warning("%s: %s; its last rows wait in memory", self._file.name, error.strerror)

    def _has_lost_its_run(self) -> bool:
        """Whether another process took over the run while this one was frozen: then that process writes the rows."""
        now = time.monotonic()
        if not self._is_lost and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._is_lost = self._run.is_taken_over()
        return self._is_lost

    def _summarise(self, report: Path | None) -> None:
        """Print the state of the run, and where its files are."""
        view, path = self._view, self._run.path
        done = "stopped" if self.stopped else "finished"
        _log.info("%s at step %s of %s after %s", done, f"{view.step:,}", f"{view.steps:,}", self._clock())
        if view.best_valid is not None and view.valid is not None:
            best = f"best {view.best_valid[1]:.4f} at step {view.best_valid[0]:,}"
            _log.info("  valid loss   %.4f (%s)", view.valid[1], best)
        _log.info("  rows         %s", self._run.metrics_path)
        checkpoints = self._run.checkpoints()
        if checkpoints:
            _log.info("  checkpoint   %s", checkpoints[-1].path)
        if report is not None:
            _log.info("  report       %s", report)
        sent = status(path)
        if sent is not None and self.wandb.pid is not None:
            has = "" if sent.state == "complete" else f"{sent.state}; `python launch/runs.py sync {path}` sends it"
            _log.info("  W&B          %s", "  ".join(filter(None, [sent.url, has])))

    def _clock(self) -> str:
        return clock(time.monotonic() - self._started)
