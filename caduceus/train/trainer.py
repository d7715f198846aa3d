"""The training loop, the same on one process or many."""

import logging
import time
from collections.abc import Iterator

import torch

from caduceus.allocator import keep_freed_memory
from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import Config
from caduceus.data.loader import Batch, TrainLoader, ValidationLoader, build_loader, build_validation
from caduceus.distributed.build import build_strategy
from caduceus.distributed.mesh import Ranks, joined
from caduceus.distributed.strategy import Single
from caduceus.evaluate.heldout import autocast, held_out_loss
from caduceus.run_directory import RunDirectory
from caduceus.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from caduceus.train.monitor import Monitor
from caduceus.train.optimizer import learning_rate
from caduceus.train.preemption import EXIT_REQUEUE, StopRequest

_log = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train until `train.steps`, from the newest valid checkpoint of the run directory if there is one.

    Runs on every rank. Returns the exit status: 0 when the run is complete, `EXIT_REQUEUE` when it stopped early with a
    checkpoint.
    """
    with joined(config) as ranks:
        if ranks.device.type == "cpu":
            keep_freed_memory()
        part = {
            "rank": ranks.data_rank,
            "world": ranks.data_world,
            "positions": ranks.positions(config.data.seq_len),
            "device": ranks.device,
        }
        loader = build_loader(config, "train", **part)
        validation = build_validation(config, **part) if config.valid.every else None
        run = RunDirectory.create_or_resume(config) if ranks.is_main else RunDirectory(config.run.dir)
        try:
            return _train(config, ranks, run, loader, validation)
        finally:
            run.release()


def _train(
    config: Config, ranks: Ranks, run: RunDirectory, loader: TrainLoader, validation: ValidationLoader | None
) -> int:
    strategy = build_strategy(config, ranks)
    progress = _resume(run, loader, strategy)
    if ranks.is_main:
        run.write_provenance({"step": progress.step, "data_fingerprint": loader.fingerprint})
    stop = StopRequest(run.path)
    with Monitor(config, run, progress.wandb_id, active=ranks.is_main) as monitor, stop.listening():
        progress.wandb_id = monitor.wandb_id
        batches = iter(loader)
        while progress.step < config.train.steps:
            row = training_step(config, strategy, loader, batches, progress)
            monitor.log_training(row)
            last = progress.step == config.train.steps
            if validation is not None and (last or progress.step % config.valid.every == 0):
                losses = held_out_loss(strategy.model, validation, ranks.device, config.train.precision, ranks.sum)
                monitor.log_validation({"step": progress.step, **losses})
            stopping = bool(ranks.maximum(stop.requested and not last))
            saving = bool(ranks.maximum(stop.save_requested()))
            if last or stopping or saving or progress.step % config.checkpoint.every == 0:
                save_checkpoint(run, progress, strategy)
                if ranks.is_main:
                    run.remove_old_checkpoints(config.checkpoint.keep)
            if stopping:
                _log.warning("stopped after step %d with a checkpoint; the same command goes on", progress.step)
                return EXIT_REQUEUE
    return 0


def training_step(
    config: Config, strategy: Single, loader: TrainLoader, batches: Iterator[Batch], progress: Progress
) -> dict[str, float | int]:
    """One optimizer step over a global batch; advances `progress` and returns its metrics row.

    Every base has the same say however the global batch is cut into ranks and micro-batches: the loss is the sum over
    them divided by the number of labelled bases (or sum of weights) of the whole global batch.
    """
    started = time.monotonic()
    ranks = strategy.ranks
    micro_batches = [next(batches) for _ in range(loader.per_step)]
    weight = ranks.sum(torch.stack([_label_weight(batch) for batch in micro_batches]).sum()).item() or 1.0
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for number, batch in enumerate(micro_batches, start=1):
        with strategy.accumulating(last=number == loader.per_step):
            with autocast(ranks.device, config.train.precision):
                output = strategy.model(batch.input_ids, batch.labels, batch.loss_weights, return_logits=False)
            share = output.loss_sum / weight
            strategy.backward(share)
        loss += share.detach()
    ranks.sum(loss)
    lr = learning_rate(progress.step + 1, config.train)
    grad_norm = strategy.clip(config.train.clip_norm)
    strategy.step(lr)
    progress.step += 1
    progress.tokens += config.train.global_batch * config.data.seq_len
    progress.loader = loader.state()
    row = {
        "step": progress.step,
        "samples": loader.samples_consumed,
        "tokens": progress.tokens,
        "loss": loss.item(),
        "lr": lr,
        "grad_norm": grad_norm.item(),
    }
    seconds = time.monotonic() - started
    return {**row, "tokens_per_second": config.train.global_batch * config.data.seq_len / seconds, "seconds": seconds}


def _label_weight(batch: Batch) -> torch.Tensor:
    labelled = batch.labels != IGNORE_LABEL
    weights = labelled if batch.loss_weights is None else batch.loss_weights * labelled
    return weights.sum(dtype=torch.float64)


def _resume(run: RunDirectory, loader: TrainLoader, strategy: Single) -> Progress:
    ranks = strategy.ranks
    checkpoint = ranks.broadcast(run.newest_valid_checkpoint() if ranks.is_main else None)
    if checkpoint is None:
        progress = Progress(step=0, tokens=0, loader=loader.state())
    else:
        progress = load_checkpoint(checkpoint, strategy)
        loader.load_state(progress.loader)
        _log.info("resuming %s after step %d (%d samples)", run.path, progress.step, loader.samples_consumed)
    if ranks.is_main:
        run.truncate_metrics(progress.step)
    return progress
