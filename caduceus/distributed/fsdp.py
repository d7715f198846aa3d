"""Fully sharded data parallelism (FSDP2): every rank holds a part of parameters, gradients and optimizer state.

`parallel.shard` ranks share one copy of the parameters. With fewer than all ranks it is hybrid sharding, in which
gradients are all-reduced between the copies to keep these equal.
"""

import contextlib
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from caduceus.config import Config
from caduceus.devices import is_gpu
from caduceus.distributed.initialisation import initialise
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy

_UNEVEN = 1.1
"""A rank that holds more than this many times its fair share causes a warning."""

_log = logging.getLogger(__name__)


class FSDP(Strategy):
    """Applies `fully_shard` to each block and to the rest; gradients are reduced only in the last pass of a step."""

    def wrap(self, config: Config, model: nn.Module) -> nn.Module:
        offload = CPUOffloadPolicy(pin_memory=is_gpu(self.ranks.device))
        holders = self._holders = config.parallel.shard or self.ranks.world
        if self.ranks.is_main and (share := largest_share(model, holders)) > _UNEVEN / holders:
            _log.warning(
                "parallel.shard: %d ranks cannot share this model evenly: one of them holds %.0f %% of the parameters "
                "instead of %.0f %%; a number of ranks that divides model.d_model (%d) can",
                *(holders, 100 * share, 100 / holders, config.model.d_model),
            )
        mesh = sharding_mesh(self.ranks, config.parallel.shard)
        self._copies = mesh.get_group("replicate") if self.copies > 1 else None
        options: dict[str, Any] = {
            "mesh": mesh,
            "shard_placement_fn": lambda parameter: shard_axis(parameter, holders),
            # Parameters and gradients stay fp32 (bf16 is too coarse for A_log and dt); autocast computes GEMMs in bf16.
            "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
            "offload_policy": offload if config.parallel.cpu_offload else OffloadPolicy(),
        }
        initialise(model, config.train, self.ranks.device, lambda part: fully_shard(part, **options))
        return model

    @property
    def writers(self) -> int:
        return self._holders

    def whole_weights(self) -> dict[str, torch.Tensor]:
        for module in self.model.modules():  # those of the ends stay gathered after a forward pass without a backward
            if isinstance(module, FSDPModule):
                module.reshard()
        device = self.ranks.device
        return {name: p.detach().to(device).full_tensor().clone() for name, p in self.model.named_parameters()}

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP averages over ranks, but the shares of the loss must be added up.
        (loss * self.ranks.world).backward()

    @property
    def copies(self) -> int:
        return self.ranks.world // self._holders

    def clip(self, clip_norm: float) -> torch.Tensor:
        if self._copies is None:
            return super().clip(clip_norm).full_tensor()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients).full_tensor().to(self.ranks.device)
        # Each copy has added it up by itself, perhaps in another order, but all must have the same bits.
        dist.broadcast(norm, group=self._copies, group_src=0)
        if clip_norm:
            parts = [gradient.to_local() for gradient in gradients]
            torch._foreach_mul_(parts, torch.clamp(clip_norm / (norm + 1e-6), max=1.0).to(parts[0].device))
        return norm


def shard_axis(parameter: torch.Tensor, holders: int) -> Shard:
    """The axis along which `holders` ranks share a parameter: the largest that they can divide evenly.

    Where there is none it is the first, the only one that FSDP2 divides unevenly. Many parameters begin with an axis of
    one or two directions; along this axis one or two ranks would hold all of it.
    """
    even = [axis for axis, size in enumerate(parameter.shape) if size % holders == 0]
    return Shard(max(even, key=lambda axis: parameter.shape[axis], default=0))


def largest_share(model: nn.Module, holders: int) -> float:
    """The largest share of all parameters that one of `holders` ranks holds."""
    parameters = list(model.parameters())
    held = 0
    for parameter in parameters:
        size = parameter.shape[shard_axis(parameter, holders).dim]
        held += parameter.numel() // size * -(-size // holders)
    return held / sum(parameter.numel() for parameter in parameters)


def sharding_mesh(ranks: Ranks, shard: int) -> DeviceMesh:
    """The device mesh: one axis where all ranks share the parameters, otherwise (replicate, shard); `shard` neighbours
    share a copy.
    """
    shard = shard or ranks.world
    if shard == ranks.world:
        return init_device_mesh(ranks.device.type, (shard,), mesh_dim_names=("shard",))
    shape = (ranks.world // shard, shard)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
    if ranks.timeout is not None:
        for group in mesh.get_all_groups():
            _set_pg_timeout(ranks.timeout, group)  # a mesh gives its groups the library's default timeout
    return mesh
