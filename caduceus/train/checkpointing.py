"""Checkpoints: the strategy writes model and optimizer; progress is JSON, and each rank writes its RNG states.

The names in the sharded files do not depend on the layout, so a run can be resumed on any number of ranks.
"""

import copy
import io
import json
import logging
import random
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from caduceus.config import Config, Stage, config_to_dict, stages_of
from caduceus.data.loader import TrainLoader
from caduceus.devices import is_gpu
from caduceus.distributed.groups import group_of
from caduceus.distributed.ranks import PATIENCE, is_lost_contact
from caduceus.distributed.strategy import Strategy
from caduceus.errors import UserError
from caduceus.files import dump_json, write_atomically
from caduceus.hub.folders import load, save_published
from caduceus.patience import patiently, system_error
from caduceus.run.checkpoints import Checkpoint
from caduceus.run.directory import RunDirectory
from caduceus.run.events import record_event
from caduceus.train.branching import branch_point
from caduceus.train.guards import MAX_REWINDS, Health
from caduceus.train.progress import Progress
from caduceus.train.schedule import default_decay_start, default_warmup, in_steps, kept_decay_start, kept_warmup

_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves the checkpoints of a run and goes back to them, on all ranks together.

    With `checkpoint.async` the state is copied to host memory, and a thread writes it while training goes on. There is
    one save at a time: the next one waits for it. A checkpoint is complete only once the files of all ranks are on
    disk.

    stage: the stage that the strategy is built for; a run without stages is a single one. Attribute `group`: the ranks
    that hold one copy of the model together, where there are several.
    """

    def __init__(self, config: Config, run: RunDirectory, strategy: Strategy, stage: Stage | None = None) -> None:
        self._config = config
        self._stage = stage or stages_of(config)[0]
        self._run = run
        self._strategy = strategy
        self._ranks = strategy.ranks
        self._behind = config.checkpoint.async_ and strategy.can_stage
        # A group of its own, so that the thread's messages do not mix with those of training.
        self.group: dist.ProcessGroup | None = None
        if strategy.writers > 1:
            first = self._ranks.rank // strategy.writers * strategy.writers
            self.group = group_of(list(range(first, first + strategy.writers)), PATIENCE, "gloo")
        self._thread: threading.Thread | None = None
        self._export: threading.Thread | None = None
        self._failure: Exception | None = None
        self._began = 0.0

    @property
    def failed(self) -> bool:
        """Whether a save has failed on this rank. The ranks must agree on this first; then `wait` raises the error."""
        return self._failure is not None

    def are_due(self, progress: Progress) -> bool:
        """Whether the run writes a checkpoint after this step: every `checkpoint.every` steps, and where the learning
        rate begins to fall.
        """
        due = progress.step % self._config.checkpoint.every == 0 or progress.step_of_stage == progress.decay_start
        return due or self._exports(progress.step)

    def _exports(self, step: int) -> bool:
        every = self._config.checkpoint.export_every
        return every > 0 and step % every == 0

    def save(self, progress: Progress, best: dict[str, Any] | None = None) -> None:
        """Begin to write checkpoints/step-…; without `checkpoint.async`, finish as well.

        best: facts for `RunDirectory.keep_best` where this step is the best of the run; None where it is not.
        """
        self.wait()
        self._began = time.monotonic()
        progress.health.rewinds = 0
        # A name never used before: ranks of an earlier start may still run on a node that cannot be reached.
        writing = self._run.checkpoints_path / f".writing-{progress.step:08d}-{secrets.token_hex(4)}"
        with self._ranks.agreeing():
            if self._ranks.is_main:
                try:
                    patiently(writing.mkdir)
                except OSError as error:
                    raise self._not_written(progress.step, error) from None
        writing = self._ranks.broadcast(writing)
        save = self._strategy.save
        write = self._strategy.stage(self.group) if self._behind else lambda directory: save(directory, self.group)
        arguments = (write, writing, copy.deepcopy(progress), rng_state(), best)
        if self._behind:
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(*arguments)
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way is complete on all ranks. Raises on every rank if it failed on any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._export is not None:  # an export reads the checkpoint, which the next save may remove
            self._export.join()
            self._export = None
        failure, self._failure = self._failure, None
        self._ranks.raise_together(failure)

    def resume(self, loader: TrainLoader) -> Progress | None:
        """Restore the newest valid checkpoint, with the loader's position, and return its progress; None where there is
        none.

        A checkpoint from the end of the stage before is the beginning of this stage.
        """
        checkpoint = former = None
        with self._ranks.agreeing(), self._run.telling_of_disks():
            if self._ranks.is_main:
                checkpoint = self._run.set_aside_damaged_checkpoints()
                former = checkpoint and (checkpoint.config() or self._run.config())
        checkpoint, former = self._ranks.broadcast((checkpoint, former))
        if checkpoint is None:
            return None
        progress = load_checkpoint(checkpoint, self._strategy)
        if progress.stage == self._stage.number - 1:
            loader.seek(0)
            return progress.next_stage(self._stage.config, loader)
        loader.load_state(progress.loader)
        self._keep_schedule(progress, stages_of(former)[progress.stage - 1].config)
        return progress

    def branch(self, loader: TrainLoader) -> Progress:
        """Restore the checkpoint of `train.decay_from`, with the loader's position, and return its progress."""
        checkpoint = None
        with self._ranks.agreeing(), self._run.telling_of_disks():
            if self._ranks.is_main:
                checkpoint = branch_point(self._config)
        checkpoint = self._ranks.broadcast(checkpoint)
        progress = load_checkpoint(checkpoint, self._strategy)
        loader.load_state(progress.loader)
        progress.decay_start = default_decay_start(self._config.train, progress.step)
        return progress

    def _keep_schedule(self, progress: Progress, former: Config) -> None:
        train, began_with, step = self._stage.config.train, progress.warmup_steps, progress.step_of_stage
        if began_with is None:
            began_with = default_warmup(in_steps(former))
        progress.warmup_steps = kept_warmup(in_steps(self._stage.config), in_steps(former), began_with, step)
        progress.decay_start = kept_decay_start(train, former.train, progress.decay_start, step)
        if self._ranks.is_main and train.steps != former.train.steps:
            _log.info(
                "train.steps: %d instead of %d; the warm-up stays at the %d steps that the run began with, and the "
                "learning rate goes on from %.3g",
                *(train.steps, former.train.steps, progress.warmup_steps),
                progress.learning_rate(train),
            )

    def rewind(self, progress: Progress, loader: TrainLoader) -> Progress | None:
        """Restore the newest valid checkpoint, but go on with the samples after `progress`; None where there is none.

        Raises `UserError` where the run went back to that checkpoint too often already.
        """
        self.wait()
        if progress.health.rewinds == MAX_REWINDS:
            raise UserError(
                f"train.spike_factor: after {MAX_REWINDS} rewinds to one checkpoint the loss still jumps at step "
                f"{progress.step}; lower train.lr or raise the factor"
            )
        position = loader.state()
        before = self.resume(loader)
        if before is None:
            return None
        loader.load_state(position)
        _log.warning(
            "the loss jumped at step %d: back to step %d, and on with the samples after %d",
            progress.step,
            before.step,
            position["samples_consumed"],
        )
        health = replace(
            before.health, skipped_steps=progress.health.skipped_steps, rewinds=progress.health.rewinds + 1
        )
        return replace(before, loader=position, health=health)

    def _write(
        self,
        write: Callable[[Path], None],
        writing: Path,
        progress: Progress,
        rng: dict[str, Any],
        best: dict[str, Any] | None,
    ) -> None:
        try:
            if is_gpu(self._ranks.device):  # a new thread begins on the first GPU, and would take memory of it
                torch.cuda.set_device(self._ranks.device)
            write(writing)
            if self._ranks.is_main:
                state = io.BytesIO()
                torch.save(rng, state)
                write_atomically(writing / "rng.pt", state.getvalue())
                write_atomically(writing / "progress.json", dump_json(asdict(progress)))
                facts = {"samples": progress.samples, "stage": progress.stage, "config": config_to_dict(self._config)}
                self._run.complete_checkpoint(writing, progress.step, facts)
                if best is not None:
                    self._run.keep_best(progress.step, best)
                seconds = round(time.monotonic() - self._began, 3)
                record_event(self._run.path, "checkpoint", progress.step, seconds=seconds)
                self._remove_old(progress)
                if self._exports(progress.step):
                    self._begin_export(progress.step)
        except (Exception, dcp.CheckpointException) as error:  # otherwise an exception of the thread would be lost
            if self._ranks.is_main:
                shutil.rmtree(writing, ignore_errors=True)
            of_disk = isinstance(error, (OSError, RuntimeError, dcp.CheckpointException)) and not is_lost_contact(error)
            self._failure = self._not_written(progress.step, error) if of_disk else error

    def _begin_export(self, step: int) -> None:
        """Write RUN/export/step-… from the complete checkpoint in a thread. If that fails, only the export is lost."""

        def export() -> None:
            checkpoint, folder = self._run.checkpoint_path(step), self._run.path / "export" / f"step-{step:08d}"
            try:
                folder.parent.mkdir(exist_ok=True)
                save_published(load(checkpoint), folder, checkpoint)
            except (UserError, OSError) as error:
                _log.warning("%s: the export of step %d was not written (%s)", folder, step, error)

        self._export = threading.Thread(target=export, name="export", daemon=True)
        self._export.start()

    def _remove_old(self, progress: Progress) -> None:
        keep, stages = self._config.checkpoint, stages_of(self._config)
        kept = {*accumulate(stage.config.train.steps for stage in stages)}  # other runs may begin where a stage ended
        if progress.decay_start is not None:
            kept.add(progress.steps_before + progress.decay_start)
        try:
            self._run.remove_old_checkpoints(keep.keep, keep.keep_every, kept)
        except OSError as error:  # this only takes disk space, and the next save tries again
            _log.warning("%s: old checkpoints could not be removed (%s)", self._run.checkpoints_path, error)

    def _not_written(self, step: int, error: Exception) -> UserError:
        return UserError(
            f"{self._run.checkpoints_path}: the checkpoint of step {step} could not be written "
            f"({_reason(error)}); earlier checkpoints are untouched: make room or mend the "
            "disk, and start the same command again"
        )


def load_checkpoint(checkpoint: Checkpoint, strategy: Strategy) -> Progress:
    """Restore model, optimizer and RNG states in place, on any number of ranks."""
    try:
        strategy.load(checkpoint.path)
    except (RuntimeError, ValueError) as error:
        if is_lost_contact(error):
            raise
        raise UserError(f"{checkpoint.path}: not a checkpoint of this model ({_last_line(error)})") from None
    with strategy.ranks.agreeing():
        rng, progress = checkpoint.path / "rng.pt", checkpoint.path / "progress.json"
        set_rng_state(patiently(lambda: torch.load(rng, weights_only=False), is_there=True))
        values = json.loads(patiently(progress.read_bytes, is_there=True))
        values.pop("wandb_id", None)  # older checkpoints have it here; now the run directory keeps it
    return Progress(**{**values, "health": Health(**values["health"])})


def rng_state() -> dict[str, Any]:
    """The states of this process's random number generators."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the random number generators to a `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _reason(error: Exception) -> str:
    """Why a save failed: the system's error of the rank that failed, where there is one."""
    if isinstance(error, dcp.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return str(system_error(error) or _last_line(error))


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
