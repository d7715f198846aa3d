"""AdamW and the learning-rate schedule of the published recipe."""

import math

import torch
from torch import nn

from caduceus.config import TrainConfig

WARMUP_START_LR = 1e-6


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with no weight decay on biases, norms, A_log and D."""
    groups = model.parameter_groups(config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 1 … `steps`: linear warm-up from 1e-6, then a cosine down to `min_lr`."""
    warmup = config.warmup_steps if config.warmup_steps is not None else config.steps // 10
    done = step - 1
    if done < warmup:
        return WARMUP_START_LR + (config.lr - WARMUP_START_LR) * done / warmup
    progress = (done - warmup) / max(config.steps - warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
