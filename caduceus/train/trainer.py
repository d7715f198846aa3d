"""The training loop on one process."""

import logging
import time
from collections.abc import Iterator

import torch
from torch import nn

from caduceus import CaduceusForMaskedLM
from caduceus.config import Config
from caduceus.data.loader import Batch, Loader, build_loader, build_validation
from caduceus.errors import UserError
from caduceus.evaluate.heldout import autocast, held_out_loss
from caduceus.run_directory import RunDirectory
from caduceus.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from caduceus.train.monitor import Monitor
from caduceus.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from caduceus.train.preemption import EXIT_REQUEUE, StopRequest

_log = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train until `train.steps`, from the newest valid checkpoint of the run directory if there is one.

    Returns the exit status: 0 when the run is complete, `EXIT_REQUEUE` when it stopped early with a checkpoint.
    """
    device = choose_device(config.run.device)
    loader = build_loader(config, "train")
    validation = build_validation(config) if config.valid.every else None
    run = RunDirectory.create_or_resume(config)
    try:
        return _train(config, run, device, loader, validation)
    finally:
        run.release()


def _train(config: Config, run: RunDirectory, device: torch.device, loader: Loader, validation) -> int:
    model = build_model(config, device)
    optimizer = build_optimizer(model, config.train)
    progress = _resume(run, loader, model, optimizer)
    run.write_provenance({"step": progress.step, "data_fingerprint": loader.state()["fingerprint"]})
    stop = StopRequest(run.path)
    with Monitor(config, run, progress.wandb_id) as monitor, stop.listening():
        progress.wandb_id = monitor.wandb_id
        batches = iter(loader)
        while progress.step < config.train.steps:
            row = training_step(config, model, optimizer, batches, progress, device)
            progress.loader = loader.state()
            monitor.log_training(row)
            last = progress.step == config.train.steps
            if validation is not None and (last or progress.step % config.valid.every == 0):
                losses = held_out_loss(model, validation, device, config.train.precision)
                monitor.log_validation({"step": progress.step, **losses})
            stopping = stop.reason is not None and not last
            if last or stopping or progress.step % config.checkpoint.every == 0 or stop.save_requested():
                save_checkpoint(run, progress, model, optimizer)
                run.remove_old_checkpoints(config.checkpoint.keep)
            if stopping:
                _log.warning("stopped by %s after step %d; the same command goes on", stop.reason, progress.step)
                return EXIT_REQUEUE
    return 0


def training_step(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    progress: Progress,
    device: torch.device,
) -> dict[str, float | int]:
    """One optimizer step over a global batch; advances `progress` and returns its metrics row.

    Every base has the same say however the global batch is cut into micro-batches: the loss is the sum over them
    divided by the number of labelled bases (or sum of weights) of the whole global batch.
    """
    started = time.monotonic()
    lr = learning_rate(progress.step + 1, config.train)
    set_learning_rate(optimizer, lr)
    micro_batches = [next(batches) for _ in range(config.train.global_batch // config.train.micro_batch)]
    weight = sum(batch.label_weight() for batch in micro_batches)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for batch in micro_batches:
        with autocast(device, config.train.precision):
            output = model(**batch.model_inputs(device), return_logits=False)
        scaled = output.loss_sum / max(weight, 1.0)
        scaled.backward()
        loss += scaled.detach()
    grad_norm = clip_gradients(model, config.train.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.tokens += config.train.global_batch * config.data.seq_len
    row = {
        "step": progress.step,
        "samples": progress.step * config.train.global_batch,
        "tokens": progress.tokens,
        "loss": loss.item(),
        "lr": lr,
        "grad_norm": grad_norm.item(),
    }
    seconds = time.monotonic() - started
    return {**row, "tokens_per_second": config.train.global_batch * config.data.seq_len / seconds, "seconds": seconds}


def clip_gradients(model: nn.Module, clip_norm: float) -> torch.Tensor:
    """Scale the gradients to a global norm of at most `clip_norm` (0: leave them); returns the norm before."""
    return nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))


def build_model(config: Config, device: torch.device) -> nn.Module:
    """The model, initialised from `train.seed`, on `device`."""
    torch.manual_seed(config.train.seed)
    checkpoint_blocks = config.train.activation_checkpointing == "block"
    model = CaduceusForMaskedLM(config.model, backend=config.ops.backend, checkpoint_blocks=checkpoint_blocks)
    model.to(device).train()
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    return model


def choose_device(name: str) -> torch.device:
    """The device of `run.device`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device: cuda was asked for, but torch sees no GPU here; use run.device=cpu")
    return torch.device(name)


def _resume(run: RunDirectory, loader: Loader, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    checkpoint = run.newest_valid_checkpoint()
    if checkpoint is None:
        run.truncate_metrics(0)
        return Progress(step=0, tokens=0, loader=loader.state())
    progress = load_checkpoint(checkpoint, model, optimizer)
    loader.restore(progress.loader)
    run.truncate_metrics(progress.step)
    _log.info("resuming %s from step %d (%d samples)", run.path, progress.step, progress.loader["samples_consumed"])
    return progress
