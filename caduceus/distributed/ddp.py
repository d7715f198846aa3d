"""Data parallelism with a whole model on every rank."""

import contextlib
import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from caduceus.config import Config
from caduceus.devices import is_gpu
from caduceus.distributed.strategy import Strategy


class DDP(Strategy):
    """DistributedDataParallel over all ranks, including context-parallel ones: each has a share of every gradient."""

    def wrap(self, config: Config, model: nn.Module) -> nn.Module:
        model = super().wrap(config, model)
        if config.model.dt_rank == 1:  # in a dimension of size one, all strides mean the same memory
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        device_ids = [self.ranks.device] if is_gpu(self.ranks.device) else None
        # The model's only buffer, the complement of each base, never changes: no pass has to wait for it.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.model.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        # DDP averages over ranks, but the shares of the loss must be added up.
        (loss * self.ranks.world).backward()
