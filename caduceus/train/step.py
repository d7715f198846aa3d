"""One optimizer step over a global batch."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from caduceus.config import Config
from caduceus.data.loader import Batch, TrainLoader
from caduceus.distributed.captured import Captured
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.model.precision import autocast
from caduceus.run.directory import RunDirectory
from caduceus.train.guards import report_skipped_step
from caduceus.train.handover import Handover
from caduceus.train.metrics import Measured, StepClock
from caduceus.train.progress import Progress
from caduceus.train.vitals import Vitals


def training_step(
    config: Config,
    strategy: Strategy,
    loader: TrainLoader,
    batches: Iterator[Batch],
    progress: Progress,
    handover: Handover | None = None,
) -> dict[str, Any]:
    """Take the next global batch and update the parameters; advances `progress` and returns the metrics row.

    With the `handover` of the step before, the measurements come into the row with the exchange of the next step.

    Every base has the same weight, however the global batch is divided into ranks and micro-batches: the loss is a sum
    over all of them, divided by the number of labelled bases (or the sum of weights) of the whole global batch. A step
    whose loss or gradient is not finite, or whose loss jumped, consumes its samples and updates nothing. Loss and norm
    are global, so all ranks decide the same. Besides the exchanges of passes and clipping, the ranks add up the weights
    of the labels, which no host waits for, and meet once, before the update.
    """
    alone, handover = handover is None, handover or Handover()
    ranks, clock = strategy.ranks, StepClock(strategy.ranks.device)
    vitals = Vitals(config, strategy, progress.step + 1)
    bases = loader.global_batch * config.data.seq_len
    micro_batches, weight, failure = _take(ranks, loader, batches, clock, handover)
    shares, sums = _pass_through(config, strategy, micro_batches, weight, clock, vitals)
    parts = [torch.stack(shares).sum()[None], sums_by_species(loader, micro_batches, sums).flatten()]
    vitals.before_update()
    norm = strategy.clip(config.train.clip_norm)
    clock.lap("optimizer")
    rows = handover.meet(ranks, torch.cat([*parts, norm.detach().to(parts[0])[None]]), failure)
    clock.lap("communication")
    loss, *by_species = rows[:, :-1].sum(0).tolist()
    lr, grad_norm = progress.learning_rate(config.train), rows[0, -1].item()
    updating = progress.health.may_update(loss, grad_norm, config.train)
    if updating:
        strategy.step(lr)
        vitals.after_update()
    else:
        strategy.discard_gradients()
    clock.lap("optimizer")
    progress.step += 1
    progress.tokens += bases
    progress.loader = loader.state()
    if not updating and (suspects := _suspects(micro_batches, sums, loss)):
        reason = "the loss jumped" if progress.health.spiked else f"loss {loss}, gradient norm {grad_norm}"
        report_skipped_step(RunDirectory(config.run.dir).logs_path, ranks.rank, loader, progress.step, reason, suspects)
    row = {
        "step": progress.step,
        **of_stage(config, progress),
        "samples": progress.samples,
        "tokens": progress.tokens,
        "loss": loss,
        **_losses_by_species(loader.species, by_species),
        "lr": lr,
        "grad_norm": grad_norm,
        "skipped_steps": progress.health.skipped_steps,
    }
    handover.leave(row, Measured(config, ranks, loader, clock, vitals, bases))
    if alone:
        handover.settle(ranks)
    return row


def of_stage(config: Config, progress: Progress) -> dict[str, int]:
    """The entry of a row that names the stage; empty for a run without stages."""
    return {"stage": progress.stage} if config.train.stages else {}


def _take(
    ranks: Ranks, loader: TrainLoader, batches: Iterator[Batch], clock: StepClock, handover: Handover
) -> tuple[list[Batch], torch.Tensor, Exception | None]:
    """This rank's micro-batches, the sum of the weights of the labels of all ranks, and the error if reading failed.

    A rank that cannot read repeats a micro-batch of the step before, as the others would wait for it in the passes. All
    ranks raise when they meet. In the first step there is no such batch, and the ranks meet at once.
    """
    micro_batches, failure = [], None
    weight = torch.zeros((), dtype=torch.float64)
    try:
        micro_batches = [next(batches) for _ in range(loader.per_step)]
        weight = torch.stack([batch.label_weight() for batch in micro_batches]).sum() / ranks.strands  # all have them
    except Exception as error:
        failure = error
    clock.lap("data")
    if handover.spare is None:
        ranks.raise_together(failure)
    if failure is not None:
        micro_batches = [handover.spare] * loader.per_step
    handover.spare = micro_batches[0]
    weight = ranks.sum(weight.to(ranks.device, non_blocking=True))
    clock.lap("communication")
    return micro_batches, torch.where(weight > 0, weight, 1.0), failure


def _pass_through(
    config: Config,
    strategy: Strategy,
    micro_batches: list[Batch],
    weight: torch.Tensor,
    clock: StepClock,
    vitals: Vitals,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run forward and backward passes. Returns each micro-batch's share of the loss, and (2, B) losses and weights."""
    shares, sums = [], []
    for number, batch in enumerate(micro_batches, start=1):
        if isinstance(strategy, Captured):
            passed = strategy.replay(batch.arguments(vitals.observes(number)), weight, vitals.observes(number))
            vitals.take(passed.told, passed.region_sums)
            clock.lap("forward")
            shares.append(passed.share)
            sums.append(passed.sums)
            continue
        with strategy.accumulating(last=number == len(micro_batches)):
            with autocast(strategy.ranks.device, config.train.precision), vitals.observing(number):
                positional, named = batch.arguments(vitals.observes(number))
                output = strategy.model(*positional, **named)
            vitals.take(None, getattr(output, "region_sums", None))
            share = output.loss_sum.sum() / weight.to(output.loss_sum.dtype)  # as a graph divides, to the same bits
            clock.lap("forward")
            with clock.watching(strategy.model):
                strategy.backward(share)
            clock.lap("exchange")
        shares.append(share.detach().double())
        sums.append(torch.stack([output.loss_sum, output.weight_sum]).detach().double())
    if isinstance(strategy, Captured):
        strategy.exchange()
        clock.lap("exchange")
    return shares, sums


def sums_by_species(loader: TrainLoader, batches: list[Batch], sums: list[torch.Tensor]) -> torch.Tensor:
    """Add up the sums (2, B) of losses and of weights of each batch's sequences by species: (species, 2) float64.

    The result has no rows where there is only one species, whose loss is that of the step. (On a GPU, index_add_ would
    add in an order that differs from run to run.)
    """
    if len(loader.species) == 1:
        return sums[0].new_zeros(0, 2)
    values = torch.cat(sums, dim=1)
    rows = torch.cat([loader.species_rows(batch) for batch in batches])
    of_species = F.one_hot(rows, len(loader.species)).bool().to(values.device, non_blocking=True)
    return torch.where(of_species, values[:, :, None], 0).sum(1).T


def _losses_by_species(species: tuple[str, ...], sums: list[float]) -> dict[str, float]:
    """Mean loss of each species with labelled bases in this step."""
    pairs = zip(species, sums[0::2], sums[1::2], strict=True) if sums else ()
    return {f"loss/{name}": loss / weight for name, loss, weight in pairs if weight}


def _suspects(micro_batches: list[Batch], sums: list[torch.Tensor], total: float) -> list[int]:
    """This rank's samples with a loss that is not finite; all its samples where the total of all ranks is finite."""
    numbers = torch.cat([batch.g for batch in micro_batches])
    if math.isfinite(total):
        return numbers.tolist()
    losses = torch.cat([losses for losses, _ in sums])
    return numbers[~losses.isfinite().cpu()].tolist()
