"""Training of a network on labelled sequences: AdamW, warm-up and cosine, the best epoch on validation kept.

An epoch's end is kept on disk, so that a kill costs at most an epoch.
"""

import copy
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caduceus.errors import UserError
from caduceus.evaluate.labelled import Task
from caduceus.evaluate.metrics import is_better, measure
from caduceus.evaluate.model import Runner
from caduceus.files import write_atomically

_WARMUP_SHARE, _LAST_SHARE, _CLIP = 0.01, 0.1, 1.0


@dataclass(frozen=True)
class FitOptions:
    """How to train, by default as published for the Nucleotide Transformer tasks.

    The rate rises over 1 % of the steps and falls as a cosine to a tenth. patience: epochs without a better validation
    before training ends; 0: all. class_weights: the loss weighs classes by one over their share.
    """

    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 128
    weight_decay: float = 0.1
    patience: int = 0
    class_weights: bool = False
    batch_bases: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 0), ("batch_bases", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')}: must be at least {least}, got {value}")
        if self.lr <= 0:
            raise UserError(f"--lr: must be above 0, got {self.lr}")


@dataclass(frozen=True)
class Examples:
    """What a network is given for each example, and its label; `sizes`: bases, which bound what runs at once."""

    inputs: Sequence[Any]
    labels: np.ndarray
    sizes: Sequence[int]


@dataclass
class Fit:
    """A network in training on a task, chosen by `metric`."""

    net: nn.Module
    task: Task
    metric: str
    options: FitOptions
    runner: Runner
    """Whose device and precision it has."""
    batch_bases: int
    """Bases that run at once; a batch of more is added up."""

    def run(
        self,
        train: Examples,
        valid: Examples,
        seed: int,
        keep: Path,
        told: Callable[[int], None] = lambda examples: None,
    ) -> dict[str, Any]:
        """Train, and leave the network as it was after its best epoch: {"best_epoch", "valid": its metrics, "epochs"}.

        keep: the file of the last epoch's end; where it is there, training goes on from it. told: how many examples
        were passed.
        """
        optimizer = torch.optim.AdamW(self._groups(), lr=self.options.lr, betas=(0.9, 0.95))
        steps = self.options.epochs * math.ceil(len(train.labels) / self.options.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, self.options.lr))
        state = self._restored(keep, optimizer, schedule)
        for epoch in range(state["epoch"] + 1, self.options.epochs + 1):
            if self.options.patience and epoch - 1 - state["best_epoch"] >= self.options.patience:
                break
            self._train_epoch(train, np.random.default_rng((seed, epoch)), optimizer, schedule)
            found = measure(self.task, valid.labels, self.outputs(valid))
            if not np.isfinite(found["mse" if self.task.classes is None else "mcc"]):
                raise UserError(
                    f"--lr: the loss is no longer finite in epoch {epoch}; choose one below {self.options.lr}"
                )
            if is_better(self.metric, found[self.metric], state["valid"] and state["valid"][self.metric]):
                state |= {"best_epoch": epoch, "valid": found, "best": copy.deepcopy(self.net.state_dict())}
            state["epoch"] = epoch
            self._save(keep, state, optimizer, schedule)
            told(len(train.labels))
        self.net.load_state_dict(state["best"])
        return {"best_epoch": state["best_epoch"], "epochs": state["epoch"], "valid": state["valid"]}

    @torch.no_grad()
    def outputs(self, examples: Examples) -> np.ndarray:
        """Probabilities (n, classes), or values (n,) in the scale of the labels, float64."""
        self.net.eval()
        with self.runner.autocast():
            found = [self.net([examples.inputs[row] for row in rows]) for rows in self._micro_batches(examples)]
        return in_words_of(self.task, torch.cat(found))

    def _micro_batches(self, examples: Examples, rows: np.ndarray | None = None) -> Iterator[list[int]]:
        batch: list[int] = []
        longest = 0
        for row in range(len(examples.sizes)) if rows is None else rows:
            longest = max(longest, examples.sizes[row])
            if batch and longest * (len(batch) + 1) > self.batch_bases:
                yield batch
                batch, longest = [], examples.sizes[row]
            batch.append(int(row))
        if batch:
            yield batch

    def _train_epoch(self, train: Examples, rng: np.random.Generator, optimizer: Any, schedule: Any) -> None:
        self.net.train()
        order = rng.permutation(len(train.labels))
        weights = self._class_weights(train.labels)
        for first in range(0, len(order), self.options.batch_size):
            rows = order[first : first + self.options.batch_size]
            optimizer.zero_grad()
            total = weights[train.labels[rows]].sum() if weights is not None else len(rows)
            for part in self._micro_batches(train, rows):
                with self.runner.autocast():
                    outputs = self.net([train.inputs[row] for row in part])
                loss = self._loss(outputs, train.labels[part], weights) / float(total)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), _CLIP)
            optimizer.step()
            schedule.step()

    def _loss(self, outputs: Tensor, labels: np.ndarray, weights: np.ndarray | None) -> Tensor:
        """The sum over examples, in at least fp32."""
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.task.classes is None:
            scaled = torch.from_numpy((labels - self.task.mean) / self.task.spread).to(outputs)
            return F.mse_loss(outputs[:, 0], scaled, reduction="sum")
        weight = None if weights is None else torch.from_numpy(weights).to(outputs)
        return F.cross_entropy(outputs, torch.from_numpy(labels).to(self.runner.device), weight, reduction="sum")

    def _class_weights(self, labels: np.ndarray) -> np.ndarray | None:
        if self.task.classes is None or not self.options.class_weights:
            return None
        counts = np.bincount(labels, minlength=len(self.task.classes))
        return len(labels) / (len(counts) * np.maximum(counts, 1))

    def _groups(self) -> list[dict]:
        """With weight decay, and without: biases, norms, A_log and D."""
        backbone = getattr(self.net, "backbone", None)
        exempt = {f"backbone.{name}" for name in backbone.no_weight_decay_parameters()} if backbone else set()
        named = [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]
        bare = [p for name, p in named if name in exempt or p.ndim < 2]
        decayed = [p for name, p in named if name not in exempt and p.ndim >= 2]
        return [{"params": decayed, "weight_decay": self.options.weight_decay}, {"params": bare, "weight_decay": 0.0}]

    def _restored(self, keep: Path, optimizer: Any, schedule: Any) -> dict[str, Any]:
        if not keep.is_file():
            return {"epoch": 0, "best_epoch": 0, "valid": None, "best": None}
        saved = torch.load(keep, map_location=self.runner.device, weights_only=False)  # of this command's own folder
        self.net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        return saved["state"]

    def _save(self, keep: Path, state: dict[str, Any], optimizer: Any, schedule: Any) -> None:
        buffer = io.BytesIO()
        parts = {"net": self.net, "optimizer": optimizer, "schedule": schedule}
        torch.save({"state": state, **{name: part.state_dict() for name, part in parts.items()}}, buffer)
        write_atomically(keep, buffer.getvalue())


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step, from 0, as a share of the peak: a rise from 1e-6, then a cosine to a tenth."""
    warmup = round(_WARMUP_SHARE * steps)
    if step < warmup:
        return 1e-6 / peak + (1 - 1e-6 / peak) * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return _LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * min(done, 1))) / 2


def in_words_of(task: Task, outputs: Tensor) -> np.ndarray:
    """Outputs of a network (n, O) as probabilities (n, classes), or as values (n,) in the scale of the labels."""
    outputs = outputs.detach().double().cpu()
    return (outputs[:, 0] * task.spread + task.mean if task.classes is None else outputs.softmax(1)).numpy()
