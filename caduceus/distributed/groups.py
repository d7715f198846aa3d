"""Makes groups of some of the ranks, all at the same time, and exchanges tensors without a copy per rank."""

from datetime import timedelta

import torch
import torch.distributed as dist

from caduceus.devices import GPU, is_gpu

# Releases of torch have different names for these.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_of(members: list[int], timeout: timedelta | None, backend: str | None = None) -> dist.ProcessGroup:
    """The group of `members`, of which this rank is one. All ranks call it at the same time, each for its own group.

    Only the members wait for each other, so that all groups are made in the time of one. On NCCL they are the parts of
    one split of all ranks. (If all ranks made the groups one after another, NCCL would split once for each group, also
    for a gloo group, and then wait for members that do not split.)
    """
    return dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=True)


def gather(part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """A tensor (…) of each of R ranks -> (R, …) on all of them."""
    whole = part.new_empty(dist.get_world_size(group), *part.shape)
    _ALL_GATHER(whole.view(-1), part.reshape(-1), group=group)
    return whole


def sum_to_owners(parts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(R, …) on each of R ranks -> (…) on rank r, the sum of all ranks' r-th parts."""
    own = parts.new_empty(parts.shape[1:])
    _REDUCE_SCATTER(own.view(-1), parts.reshape(-1), group=group)
    return own


def on_device(device: torch.device) -> str | None:
    """The backend of a group that only exchanges tensors on `device`."""
    return "nccl" if is_gpu(device) else None


def of_all_ranks(device: torch.device) -> str:
    """The backends of the group of all ranks, which exchange tensors in host memory as well."""
    return f"cpu:gloo,{GPU}:nccl" if is_gpu(device) else "gloo"
