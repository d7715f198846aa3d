"""Groups of some of the ranks, made by all of them at the same time, and exchanges without a copy per rank."""

from datetime import timedelta

import torch
import torch.distributed as dist

# By the names that releases of torch have for them.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_of(members: list[int], timeout: timedelta | None, backend: str | None = None) -> dist.ProcessGroup:
    """The group of `members`, one of which is this rank; every rank calls it at once, each for a group of its own.

    Only the members wait for each other, so that all groups are made in the time of one. On NCCL they are the parts
    of one split of all ranks. (Of groups that all ranks make one after another, NCCL splits once for each of them, also
    where the group is to be one of gloo, and then waits for members that do not split.)
    """
    return dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=True)


def gather(part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(…) of each of R ranks -> (R, …) on all of them."""
    whole = part.new_empty(dist.get_world_size(group), *part.shape)
    _ALL_GATHER(whole.view(-1), part.reshape(-1), group=group)
    return whole


def sum_to_owners(parts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(R, …) on each of R ranks -> (…) on rank r, the sum of all ranks' r-th parts."""
    own = parts.new_empty(parts.shape[1:])
    _REDUCE_SCATTER(own.view(-1), parts.reshape(-1), group=group)
    return own


def on_device(device: torch.device) -> str | None:
    """The backend of a group that only exchanges what lies on `device`."""
    return "nccl" if device.type == "cuda" else None
