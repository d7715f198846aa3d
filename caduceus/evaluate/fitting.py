"""Trains a network on labelled sequences in the way of a run: with the trainer's own loop, optimizer, schedule,
checkpoints and rows, on one rank or on those of torchrun. The best epoch on validation is kept.

A fit has a run directory with metrics.jsonl, which `python -m caduceus.monitor` shows, and until its end a checkpoint
of the newest epoch, from which the same call goes on.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from caduceus.config import Config, DataConfig, ParallelConfig, RunConfig, TrainConfig
from caduceus.config.run import CheckpointConfig, MonitorConfig, ValidConfig, WandbConfig
from caduceus.distributed.ddp import DDP
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.rendezvous import joined
from caduceus.distributed.strategy import Single
from caduceus.errors import UserError
from caduceus.evaluate.examples import ExampleLoader, Examples, WithLoss, label_tensors, losses_of, micro_batches
from caduceus.evaluate.labelled import Task
from caduceus.evaluate.metrics import SMALLER_IS_BETTER, measure, names_of
from caduceus.evaluate.model import Runner
from caduceus.evaluate.parts import is_alone, is_within_a_run
from caduceus.evaluate.results import flat_labels
from caduceus.monitor.rows import Monitor
from caduceus.run.directory import RunDirectory
from caduceus.train.checkpointing import Checkpoints
from caduceus.train.loop import Loop
from caduceus.train.optimizer import build_optimizer
from caduceus.train.progress import Progress
from caduceus.train.stopping import StopRequest
from caduceus.train.watchdog import Watchdog

_WARMUP_SHARE, _LAST_SHARE, _CLIP = 0.01, 0.1, 1.0


@dataclass(frozen=True)
class FitOptions:
    """How to train; the defaults are those published for the Nucleotide Transformer tasks.

    The learning rate rises over 1 % of the steps and falls as a cosine to a tenth. patience: epochs without a better
    validation after which training ends; 0: never. class_weights: weight the loss of classes by one over their share.
    wandb: mode of W&B.
    """

    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 128
    weight_decay: float = 0.1
    patience: int = 0
    class_weights: bool = False
    batch_bases: int | None = None
    wandb: str = "disabled"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 0), ("batch_bases", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"--lr: must be above 0, got {self.lr}")


@contextmanager
def ranks_of(runner: Runner) -> Iterator[Ranks]:
    """The ranks that torchrun or the launcher started, connected as those of a run; in `alone`, this process only."""
    if is_alone():
        yield Ranks(0, 1, 1, runner.device)
        return
    config = _config(runner, FitOptions(batch_size=int(os.environ["WORLD_SIZE"])), 1)
    config.run.device = runner.device.type
    with joined(config) as ranks:
        yield ranks


def _config(runner: Runner, options: FitOptions, steps: int) -> Config:
    train = TrainConfig(
        steps=steps,
        global_batch=options.batch_size,
        micro_batch=1,
        lr=options.lr,
        min_lr=_LAST_SHARE * options.lr,
        warmup_steps=round(_WARMUP_SHARE * steps),
        weight_decay=options.weight_decay,
        clip_norm=_CLIP,
        precision=runner.precision,
    )
    return Config(
        model=runner.config,
        train=train,
        parallel=ParallelConfig(context=1, strands=1),
        valid=ValidConfig(every=1),
        checkpoint=CheckpointConfig(keep=1, async_=False),
        monitor=MonitorConfig(every=0, windows=0, report=False),
        wandb=WandbConfig(mode=options.wandb, job_type="finetune"),
    )


@dataclass
class Fit:
    """Trains a network on a task; `metric` chooses the best epoch, `runner` gives device and precision.

    augment: whether a coin decides which strand of a sequence it sees.
    """

    net: nn.Module
    task: Task
    metric: str
    options: FitOptions
    runner: Runner
    ranks: Ranks
    augment: bool = False

    def run(self, train: Examples, valid: Examples, seed: int, folder: Path) -> dict[str, Any]:
        """Train, and leave the network in the state of its best epoch. Returns {"best_epoch", "valid": its metrics,
        "epochs"}.

        folder: the run directory; training goes on from a checkpoint in it. All ranks call it. Where it was told to
        stop, it raises `SystemExit` after a checkpoint, with the trainer's status that asks for another start.
        """
        loader = self._loader(train, seed)
        config = self._run_config(train, loader, seed, folder)
        run = RunDirectory(folder)
        with self.ranks.agreeing():
            if self.ranks.is_main:
                run = RunDirectory.create_or_resume(config)
        try:
            return self._to_the_end(config, run, loader, valid)
        finally:
            run.release()

    def _to_the_end(self, config: Config, run: RunDirectory, loader: ExampleLoader, valid: Examples) -> dict[str, Any]:
        """Train from the run's newest checkpoint to the end."""
        kind = DDP if self.ranks.world > 1 else Single
        strategy = kind(config, self.ranks, WithLoss(self.net, self.task), build_optimizer)
        checkpoints = Checkpoints(config, run, strategy)
        progress = checkpoints.resume(loader) or Progress(0, 0, loader.state(), config.train.warmup_steps)
        watchdog = Watchdog(run.logs_path, self.ranks.rank, config.train.stall_minutes)
        with self.ranks.agreeing(), run.telling_of_disks():
            if self.ranks.is_main:
                run.truncate_metrics(progress.step)
                run.write_provenance({"step": progress.step, "ranks": self.ranks.world})
            monitor = Monitor(config, run, active=self.ranks.is_main, shown=not is_within_a_run())
            stop = StopRequest(run, self.ranks.is_main, 0.0, 0.0)
        loop = _FitLoop(
            config, run, strategy, checkpoints, loader, progress, monitor, stop, watchdog, fit=self, valid=valid
        )
        # Within a run, which owns the terminal and the signals, a fit shows nothing and goes on to its end.
        listening = contextlib.nullcontext() if is_within_a_run() else stop.listening()
        with listening, monitor, watchdog:
            status = loop.run_to_the_end()
            if not status:
                return loop.take_best()
        raise SystemExit(status)

    def _loader(self, train: Examples, seed: int) -> ExampleLoader:
        most = self.runner.batch_bases(self.options.batch_bases)
        weights = self._class_weights(train.labels)
        place = self.ranks.device, self.ranks.rank, self.ranks.world
        return ExampleLoader(train, self.task, self.options.batch_size, most, seed, *place, weights, self.augment)

    def _run_config(self, train: Examples, loader: ExampleLoader, seed: int, folder: Path) -> Config:
        steps = self.options.epochs * loader.per_epoch
        config = _config(self.runner, self.options, steps)
        config.train.seed = seed
        config.data = DataConfig(seq_len=max(1, round(float(np.mean(train.sizes)))))
        config.run = RunConfig(dir=str(folder), name=folder.name, device=self.runner.device.type)
        config.valid.every = config.checkpoint.every = loader.per_epoch
        config.checkpoint.best = f"valid_{self.metric}"
        config.checkpoint.best_is = "min" if self.metric in SMALLER_IS_BETTER else "max"
        return config

    def _class_weights(self, labels: Sequence[Any]) -> np.ndarray | None:
        if not self.options.class_weights:
            return None
        if self.task.classes is None or self.task.several:
            raise UserError("--class-weights: needs a classification in which each example has one class")
        numbers = np.concatenate([np.atleast_1d(label) for label in labels])
        counts = np.bincount(numbers[numbers >= 0].astype(np.int64), minlength=len(self.task.classes))
        return counts.sum() / (len(counts) * np.maximum(counts, 1))

    def outputs(self, examples: Examples) -> list[np.ndarray]:
        """The network's outputs for each example, float64: (O,), or per base (L, O). Ranks share the work."""
        return outputs_of(self.net, self.runner, examples, self.options.batch_bases, self.ranks)


@dataclass
class _FitLoop(Loop):
    """The steps of a fit, with a validation and a checkpoint after each epoch."""

    fit: Fit
    valid: Examples

    def is_over(self) -> bool:
        return super().is_over() or self._has_waited_enough()

    def _has_waited_enough(self) -> bool:
        """Whether the last `patience` epochs were not better than an earlier one."""
        per_epoch, patience = self.config.valid.every, self.fit.options.patience
        waited = self.progress.step // per_epoch - (self.best.step or 0) // per_epoch
        return bool(patience) and waited >= patience

    def told_at_start(self) -> dict[str, Any]:
        rows = self.run.newest_metrics("valid_loss") if self.strategy.ranks.is_main else []
        rows = self.strategy.ranks.broadcast([row for row in rows if row["step"] == self.progress.step])
        return rows[0] if rows else {}

    def validated(self) -> dict[str, Any]:
        with self.watchdog.over(f"the validation after step {self.progress.step}"):
            outputs = self.fit.outputs(self.valid)
        found = measured(self.fit.task, self.valid, outputs)
        named = {f"valid_{name}": value for name, value in found.items()}
        row = {"step": self.progress.step, "valid_loss": mean_loss(self.fit.task, self.valid, outputs), **named}
        self.monitor.log_validation(row)
        return row

    def take_best(self) -> dict[str, Any]:
        """Give the network the weights of its best epoch, return that epoch, and remove the checkpoints.

        Where no epoch has a number to be compared by, it is the last.
        """
        ranks, task = self.strategy.ranks, self.fit.task
        step = self.best.step or self.progress.step
        if step != self.progress.step:
            self.strategy.load(self.run.checkpoint_path(step))
        rows: list[dict[str, Any]] = []
        with ranks.agreeing():
            if ranks.is_main:
                rows = [row for row in self.run.metrics() if "valid_loss" in row and row["step"] == step]
                shutil.rmtree(self.run.checkpoints_path)
        row = ranks.broadcast(rows)[-1]
        found = {name: np.nan if row[f"valid_{name}"] is None else row[f"valid_{name}"] for name in names_of(task)}
        epochs = {"best_epoch": step, "epochs": self.progress.step}
        return {**{name: at // self.config.valid.every for name, at in epochs.items()}, "valid": found}


@torch.no_grad()
def outputs_of(
    net: nn.Module, runner: Runner, examples: Examples, batch_bases: int | None = None, ranks: Ranks | None = None
) -> list[np.ndarray]:
    """A network's outputs for each example, float64: (O,), per base (L, O) or per bin; `ranks` share the work."""
    training = net.training
    net.eval()
    mine = range(len(examples))[ranks.rank :: ranks.world] if ranks else range(len(examples))
    found: dict[int, np.ndarray] = {}
    with runner.autocast():
        for rows in micro_batches(examples.sizes, runner.batch_bases(batch_bases), mine):
            outputs = net([examples.inputs[row] for row in rows]).double().cpu().numpy()
            longest = max(examples.sizes[row] for row in rows)
            for row, output in zip(rows, outputs, strict=True):
                found[row] = output if output.ndim == 1 else output[: len(output) * examples.sizes[row] // longest]
    net.train(training)
    if ranks is not None and ranks.world > 1:
        found = {row: output for of in ranks.gather_objects(found) for row, output in of.items()}
    return [found[row] for row in range(len(examples))]


def predicted(task: Task, outputs: Sequence[np.ndarray]) -> np.ndarray:
    """Outputs as probabilities (n, classes), or as values in the scale of the labels, (n,) or for several (n, values).
    For labels per base, n counts bases.
    """
    stacked = torch.from_numpy(np.concatenate(outputs) if task.per_base else np.stack(outputs))
    if task.classes is None:
        values = stacked.numpy() if task.values else stacked[:, 0].numpy()
        return values * np.asarray(task.spread) + np.asarray(task.mean)
    return (stacked.sigmoid() if task.several else stacked.softmax(1)).numpy()


def measured(task: Task, examples: Examples, outputs: Sequence[np.ndarray]) -> dict[str, float]:
    """All metrics of a task, over the examples or bases with a label."""
    return measure(task, flat_labels(task, examples.labels), predicted(task, outputs))


def mean_loss(task: Task, examples: Examples, outputs: Sequence[np.ndarray]) -> float:
    """The loss per label, as in training, but without class weights."""
    total, weight = 0.0, 0.0
    for label, output in zip(examples.labels, outputs, strict=True):
        labels, weights = label_tensors(task, [label])
        losses = losses_of(task, torch.from_numpy(output)[None], labels)
        total += float((losses * weights).sum())
        weight += float(weights.sum())
    return total / max(weight, 1e-300)
