"""What memory there is for training, and what parts of it take."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from caduceus.allocator import keep_freed_memory
from caduceus.config import Config
from caduceus.distributed.strategy import Strategy
from caduceus.model.costs import kept_numbers, parameter_count

_MEMINFO = Path("/proc/meminfo")
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def keep_freed_memory_for(config: Config) -> None:
    """Set the C allocator for training on CPU, before the first tensor is made."""
    keep_freed_memory(saving=config.train.activation_checkpointing != "none")


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take from its GPU, or from its share of the host's memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _free_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Most bytes of tensors that `run` holds at a time, beyond those that were there before.

    On CPU, where torch's allocator keeps no such count, scratch memory inside an operator does not show.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with TensorBytes() as count:
        run()
    return count.peak


def kept_storages(block: nn.Module, *inputs: Any) -> list[torch.UntypedStorage]:
    """What lives on of what block(*inputs) makes, for its backward pass, when its outputs are gone."""
    with TensorBytes() as count:
        outputs = block(*inputs)
    graph = [output.grad_fn for output in outputs]
    del outputs
    kept = count.living()
    del graph  # which held it
    return kept


def moment_bytes_to_come(config: Config, strategy: Strategy) -> int:
    """Bytes on the ranks' device that the first update adds: what the optimizer keeps of this rank's parameters."""
    if strategy.optimizer.state:
        return 0
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in strategy.model.parameters())
    here = sum(part.nbytes for part in parts if part.device.type == strategy.ranks.device.type)
    return here * kept_numbers(config.model, config.train) // parameter_count(config.model)


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make within; `peak` is the most that lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # By address, which another storage may take over later.
        self._given: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self._made: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given[storage._cdata] = storage
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = storage
        # Summed anew each time, because FSDP empties and refills storages in place.
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.living()))
        return result

    def living(self) -> list[torch.UntypedStorage]:
        """Storages that were made within and live now, in the order in which they were made."""
        return list(self._made.values())


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor))
    return [tensor.untyped_storage() for tensor in tensors]


def _free_host_memory() -> int:
    """Bytes that the kernel can give, within the limits of this process's control groups (version 2)."""
    if not _MEMINFO.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = 1024 * _values(_MEMINFO)["MemAvailable:"]
    lines = _CGROUP.read_text().splitlines() if _CGROUP.is_file() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for group in (_CGROUPS / own, *(_CGROUPS / own).parents):
        limit = group / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            used = int((group / "memory.current").read_text())
            cached = _values(group / "memory.stat")["inactive_file"]
            free = min(free, int(most) - used + cached)
    return max(free, 0)


def _values(path: Path) -> dict[str, int]:
    """The names and numbers of a file of the kernel's."""
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}
