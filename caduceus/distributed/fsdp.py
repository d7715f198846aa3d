"""Fully sharded data parallelism (FSDP2): every rank holds a part of parameters, gradients and optimizer state.

`parallel.shard` ranks share one copy of the parameters; with fewer than all of them it is hybrid sharding, in which
copies are kept equal by all-reducing gradients between them.
"""

import contextlib

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from caduceus.config import Config
from caduceus.distributed.initialisation import initialise
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy


class FSDP(Strategy):
    """`fully_shard` of each block and of what is left; gradients stay unreduced until the last pass of a step."""

    def wrap(self, config: Config, model: nn.Module) -> nn.Module:
        offload = CPUOffloadPolicy(pin_memory=self.ranks.device.type == "cuda")
        options = {
            "mesh": sharding_mesh(self.ranks, config.parallel.shard),
            # Parameters and gradients stay fp32 (A_log and dt do not bear bf16); autocast computes GEMMs in bf16.
            "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
            "offload_policy": offload if config.parallel.cpu_offload else OffloadPolicy(),
        }
        initialise(model, config.train, self.ranks.device, lambda part: fully_shard(part, **options))
        return model

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP averages over ranks, and the shares of the loss are to be added up.
        (loss * self.ranks.world).backward()

    def clip(self, clip_norm: float) -> torch.Tensor:
        return super().clip(clip_norm).full_tensor()


def sharding_mesh(ranks: Ranks, shard: int) -> DeviceMesh:
    """One axis where all ranks share the parameters, (replicate, shard) otherwise; `shard` neighbours share a copy."""
    shard = shard or ranks.world
    if shard == ranks.world:
        return init_device_mesh(ranks.device.type, (shard,), mesh_dim_names=("shard",))
    shape = (ranks.world // shard, shard)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))
    if ranks.timeout is not None:
        for group in mesh.get_all_groups():
            _set_pg_timeout(ranks.timeout, group)  # a mesh gives its groups the library's own
    return mesh
