"""The training loop, the same on one process or many."""

import logging
import time

import torch

from caduceus.config import Config
from caduceus.data.loader import TrainLoader, ValidationLoader, build_loader, build_validation
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.rendezvous import joined
from caduceus.distributed.strategy import Strategy
from caduceus.errors import RetryError
from caduceus.evaluate.heldout import held_out_loss
from caduceus.monitor.rows import Monitor
from caduceus.run.directory import RunDirectory
from caduceus.train.checkpointing import SAVE_TIMEOUT, Checkpoints, Progress
from caduceus.train.guards import collect_garbage, scheduled_garbage_collection
from caduceus.train.memory import keep_freed_memory_for
from caduceus.train.optimizer import build_optimizer, default_warmup
from caduceus.train.preflight import check_before_start, check_gpu_memory, check_model, refuse_other_data
from caduceus.train.recomputation import recompute_to_fit
from caduceus.train.step import training_step
from caduceus.train.stopping import EXIT_REQUEUE, StopRequest
from caduceus.train.watchdog import Watchdog

_log = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train until `train.steps`, from the newest valid checkpoint of the run directory if there is one.

    Runs on every rank. Returns the exit status: 0 when the run is complete, `EXIT_REQUEUE` when it stopped early with a
    checkpoint.
    """
    started = time.monotonic()
    if config.run.device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory_for(config)
    with joined(config) as ranks:
        part = {
            "rank": ranks.data_rank,
            "world": ranks.data_world,
            "positions": ranks.positions(config.data.seq_len),
            "device": ranks.device,
        }
        peers = ranks.largest_of_peers if ranks.shares_samples else None
        run = RunDirectory(config.run.dir)
        watchdog = Watchdog(run.logs_path, ranks.rank, config.train.stall_minutes)
        with watchdog.over("the opening of the data", SAVE_TIMEOUT.total_seconds()):
            with ranks.agreeing():
                check_model(config, ranks.device)
                loader = build_loader(config, "train", **part, largest_of_peers=peers)
                validation = build_validation(config, **part) if config.valid.every else None
                if ranks.is_main:
                    run = RunDirectory.create_or_resume(config)
            refuse_other_data(loader, ranks)
        try:
            return _train(config, ranks, run, watchdog, loader, validation, started)
        finally:
            run.release()


def _train(
    config: Config,
    ranks: Ranks,
    run: RunDirectory,
    watchdog: Watchdog,
    loader: TrainLoader,
    validation: ValidationLoader | None,
    started: float,
) -> int:
    with watchdog.over("the start", SAVE_TIMEOUT.total_seconds()):
        strategy = build_strategy(config, ranks, build_optimizer)
        checkpoints = Checkpoints(config, run, strategy)
        progress = _resume(config, run, loader, checkpoints)
        check_before_start(config, run, strategy, checkpoints.group)
        if config.train.activation_checkpointing == "auto":
            recompute_to_fit(config, strategy)
        check_gpu_memory(config, strategy)
        with ranks.agreeing(), run.telling_of_disks():
            if ranks.is_main:
                run.keep_config(config)
                run.truncate_metrics(progress.step)
                layout = {"ranks": ranks.world, "strands": ranks.strands, "context": ranks.context}
                facts = {"step": progress.step, "data_fingerprint": loader.fingerprint, **layout}
                run.write_provenance({**facts, "startup_seconds": time.monotonic() - started})
            monitor = Monitor(config, run, active=ranks.is_main)
            stop = StopRequest(run, ranks.is_main, started, 60 * config.run.time_budget_minutes)
    with stop.listening(), monitor, scheduled_garbage_collection():
        batches = iter(loader)
        _log.info("ready to train after %.1f s", time.monotonic() - started)
        while progress.step < config.train.steps:
            with watchdog.over(f"step {progress.step + 1}"):
                row = training_step(config, strategy, loader, batches, progress)
            monitor.log_training(row)
            collect_garbage(progress.step)
            progress.health.refuse_to_go_on(config.train, run.logs_path)
            if progress.health.spiked:
                with watchdog.over("the rewind", SAVE_TIMEOUT.total_seconds()):
                    before = checkpoints.rewind(progress, loader)
                if before is not None:
                    progress, batches = before, iter(loader)
                    with ranks.agreeing(), run.telling_of_disks():
                        monitor.rewind(progress.step)
                    continue
            last = progress.step == config.train.steps
            if validation is not None and (last or progress.step % config.valid.every == 0):
                monitor.log_validation(_validate(config, strategy, validation, watchdog, progress.step))
            with watchdog.over(f"the agreement after step {progress.step}"):
                wishes = ranks.gather(
                    [stop.requested and not last, stop.save_requested(), checkpoints.failed, run.is_taken_over()]
                )
            stopping, saving, failed, taken_over = wishes.any(0).tolist()
            if taken_over:
                raise RetryError(f"run.dir: {run.path} was taken over by another process; this one ends without saving")
            with watchdog.over(f"the checkpoint after step {progress.step}", SAVE_TIMEOUT.total_seconds()):
                if last or stopping or saving or progress.step % config.checkpoint.every == 0:
                    checkpoints.save(progress)
                if last or stopping or failed:
                    checkpoints.wait()
            if last or stopping:
                stop.is_saved()
            if stopping:
                monitor.stopped = True
                _log.warning("stopped after step %d with a checkpoint; the same command goes on", progress.step)
                return EXIT_REQUEUE
    return 0


def _validate(
    config: Config, strategy: Strategy, validation: ValidationLoader, watchdog: Watchdog, step: int
) -> dict[str, float]:
    ranks, what = strategy.ranks, f"a batch of the validation after step {step}"
    losses = held_out_loss(
        strategy.model,
        validation,
        ranks.device,
        config.train.precision,
        add_up=ranks.sum,
        each=lambda batches: watchdog.over_each(what, ranks.together(batches)),
    )
    return {"step": step, **losses}


def _resume(config: Config, run: RunDirectory, loader: TrainLoader, checkpoints: Checkpoints) -> Progress:
    started = time.monotonic()
    progress = checkpoints.resume(loader)
    if progress is None:
        return Progress(step=0, tokens=0, loader=loader.state(), warmup_steps=default_warmup(config.train))
    _log.info(
        "resuming %s after step %d (%d samples), loaded in %.1f s",
        run.path,
        progress.step,
        loader.samples_consumed,
        time.monotonic() - started,
    )
    return progress
