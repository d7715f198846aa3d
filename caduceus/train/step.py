"""One optimizer step over a global batch."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import Config
from caduceus.data.loader import Batch, TrainLoader
from caduceus.distributed.strategy import Strategy
from caduceus.evaluate.heldout import autocast
from caduceus.run.directory import RunDirectory
from caduceus.train.checkpointing import Progress
from caduceus.train.guards import report_skipped_step
from caduceus.train.metrics import StepClock, measurements
from caduceus.train.optimizer import learning_rate


def training_step(
    config: Config, strategy: Strategy, loader: TrainLoader, batches: Iterator[Batch], progress: Progress
) -> dict[str, Any]:
    """Take the next global batch and update the parameters; advances `progress` and returns the metrics row.

    Every base has the same say however the global batch is cut into ranks and micro-batches: the loss is the sum over
    them divided by the number of labelled bases (or sum of weights) of the whole global batch. A step whose loss or
    gradient is not finite, or whose loss leapt, consumes its samples and updates nothing: loss and norm are global, so
    all ranks see the same.
    """
    ranks = strategy.ranks
    clock = StepClock(ranks.device)
    with ranks.agreeing():
        micro_batches = [next(batches) for _ in range(loader.per_step)]
        clock.lap("data")
    weight = torch.stack([_label_weight(batch) for batch in micro_batches]).sum() / ranks.strands  # each has all labels
    weight = ranks.sum(weight).item() or 1.0
    clock.lap("communication")
    shares = []
    for number, batch in enumerate(micro_batches, start=1):
        with strategy.accumulating(last=number == loader.per_step):
            with autocast(ranks.device, config.train.precision):
                output = strategy.model(batch.input_ids, batch.labels, batch.loss_weights, return_logits=False)
            share = output.loss_sum / weight
            clock.lap("forward")
            with clock.watching(strategy.model):
                strategy.backward(share)
            clock.lap("exchange")
        shares.append(share.detach().double())
    loss = ranks.sum(torch.stack(shares).sum()).item()
    clock.lap("communication")
    lr = learning_rate(progress.step + 1, config.train, progress.warmup_steps)
    grad_norm = strategy.clip(config.train.clip_norm).item()
    updating = progress.health.may_update(loss, grad_norm, config.train)
    if updating:
        strategy.step(lr)
    else:
        strategy.discard_gradients()
    clock.lap("optimizer")
    progress.step += 1
    progress.tokens += config.train.global_batch * config.data.seq_len
    progress.loader = loader.state()
    if not updating:
        suspects = _suspects(micro_batches, torch.stack(shares).tolist(), loss)
        if suspects:
            reason = "the loss leapt" if progress.health.spiked else f"loss {loss}, gradient norm {grad_norm}"
            logs = RunDirectory(config.run.dir).logs_path
            report_skipped_step(logs, ranks.rank, loader, progress.step, reason, suspects)
    return {
        "step": progress.step,
        "samples": loader.samples_consumed,
        "tokens": progress.tokens,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "skipped_steps": progress.health.skipped_steps,
        **measurements(config, ranks, loader, clock),
    }


def _label_weight(batch: Batch) -> torch.Tensor:
    labelled = batch.labels != IGNORE_LABEL
    weights = labelled if batch.loss_weights is None else batch.loss_weights * labelled
    return weights.sum(dtype=torch.float64)


def _suspects(micro_batches: list[Batch], losses: list[float], total: float) -> list[Batch]:
    """This rank's micro-batches that made the loss non-finite; all of them where the total of all ranks is finite."""
    if math.isfinite(total):
        return micro_batches
    return [batch for batch, loss in zip(micro_batches, losses, strict=True) if not math.isfinite(loss)]
