"""The learning rate of every step: four schedules, and which parts of them stay when a run is made longer."""

import math
from dataclasses import replace

from caduceus.config import Config, TrainConfig
from caduceus.config.by_step import BatchRamp
from caduceus.errors import UserError

WARMUP_START_LR = 1e-6


def in_steps(config: Config) -> TrainConfig:
    """The keys `train` of a run, with a warm-up that is given in bases converted to steps."""
    train = config.train
    if train.warmup_tokens is None:
        return train
    steps = BatchRamp.of(train).steps_before(math.ceil(train.warmup_tokens / config.data.seq_len) - 1) + 1
    return replace(train, warmup_tokens=None, warmup_steps=steps if train.warmup_tokens else 0)


def default_warmup(config: TrainConfig) -> int:
    """Steps of warm-up of a run that begins under `config`."""
    return config.steps // 10 if config.warmup_steps is None else config.warmup_steps


def default_decay_start(config: TrainConfig, branched_at: int | None = None) -> int | None:
    """The step after which the rate of `wsd` falls; None under other schedules.

    `branched_at`: the step of the checkpoint that `train.decay_from` names.
    """
    if config.schedule != "wsd":
        return None
    if config.decay_steps is not None:
        return config.steps - config.decay_steps
    return config.steps - max(1, config.steps // 10) if branched_at is None else branched_at


def kept_warmup(config: TrainConfig, former: TrainConfig, warmup: int, step: int) -> int:
    """Steps of warm-up of a run that goes on after `step` under `config`, and had `warmup` of them under `former`.

    A run keeps its warm-up when `steps` changes: a tenth of more steps could take the rate back into the warm-up.
    Raises `UserError` where another `warmup_steps` would do so.
    """
    if config.warmup_steps is None or config.warmup_steps == former.warmup_steps:
        return warmup
    if config.warmup_steps > step >= warmup:
        raise UserError(
            f"train.warmup_steps: {config.warmup_steps} would take the learning rate back into warm-up, which ended at "
            f"step {warmup} of the {step} that the run has made; leave it as it was, or choose another run.dir"
        )
    return config.warmup_steps


def kept_decay_start(config: TrainConfig, former: TrainConfig, start: int | None, step: int) -> int | None:
    """The step after which the rate falls, in a run that goes on after `step`, and had `start` under `former`.

    Before its decay a run may become longer or shorter. Raises `UserError` where the end changes once the rate falls.
    """
    if config.schedule != "wsd":
        return None
    if start is None:
        return max(step, default_decay_start(config) or 0)
    ends = [(values.steps, values.decay_steps) for values in (former, config)]
    if ends[0] == ends[1]:
        return start
    if step > start:
        raise UserError(
            f"train.steps: the learning rate falls from step {start} to the end at step {former.steps}, and would rise "
            f"again; start another run from before the decay, by train.decay_from=RUN/checkpoints/step-{start:08d}"
        )
    branched_at = start if config.decay_from is not None else None
    return max(step, default_decay_start(config, branched_at) or 0)


def learning_rate(step: int, config: TrainConfig, warmup: int, decay_start: int | None = None) -> float:
    """Learning rate of step 1 … `steps`: linear `warmup` from 1e-6, then what `train.schedule` says.

    `decay_start`: the step after which the rate of `wsd` falls.
    """
    done = step - 1
    if done < warmup:
        return WARMUP_START_LR + (config.lr - WARMUP_START_LR) * done / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse_sqrt":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1) / max(done, 1)))
    if config.schedule == "wsd":
        assert decay_start is not None, "a run under wsd must have a decay"
        progress = max(done - decay_start, 0) / max(config.steps - decay_start, 1)
        return config.min_lr + (config.lr - config.min_lr) * (1 - math.sqrt(progress))
    progress = (done - warmup) / max(config.steps - warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
