"""The optimizer of the published recipe."""

import torch
from torch import nn

from caduceus.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with no weight decay on biases, norms, A_log and D."""
    groups = model.parameter_groups(config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas))
