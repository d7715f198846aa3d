"""AdamW and the learning-rate schedule of the published recipe."""

import math

import torch
from torch import nn

from caduceus.config import TrainConfig
from caduceus.errors import UserError

WARMUP_START_LR = 1e-6


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with no weight decay on biases, norms, A_log and D."""
    groups = model.parameter_groups(config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas))


def default_warmup(config: TrainConfig) -> int:
    """Steps of warm-up of a run that begins under `config`."""
    return config.steps // 10 if config.warmup_steps is None else config.warmup_steps


def kept_warmup(config: TrainConfig, former: TrainConfig, warmup: int, step: int) -> int:
    """Steps of warm-up of a run that goes on after `step` under `config`, and had `warmup` of them under `former`.

    A run keeps its warm-up when `steps` changes: a tenth of more steps would take the rate back into it. Raises
    `UserError` where another `warmup_steps` would do so.
    """
    if config.warmup_steps is None or config.warmup_steps == former.warmup_steps:
        return warmup
    if config.warmup_steps > step >= warmup:
        raise UserError(
            f"train.warmup_steps: {config.warmup_steps} would take the learning rate back into warm-up, which ended at "
            f"step {warmup} of the {step} that the run has made; leave it as it was, or choose another run.dir"
        )
    return config.warmup_steps


def learning_rate(step: int, config: TrainConfig, warmup: int) -> float:
    """Learning rate of step 1 … `steps`: linear `warmup` from 1e-6, then a cosine down to `min_lr`."""
    done = step - 1
    if done < warmup:
        return WARMUP_START_LR + (config.lr - WARMUP_START_LR) * done / warmup
    progress = (done - warmup) / max(config.steps - warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
