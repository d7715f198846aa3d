"""The memory that is free for training, and the memory that parts of it take."""

import gc
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
from caduceus.devices import is_gpu
from caduceus.distributed.strategy import Strategy
from caduceus.model.costs import kept_numbers, parameter_count
from caduceus.patience import is_file

_MEMINFO = Path("/proc/meminfo")
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def keep_freed_memory_for(config: Config) -> None:
    """Set the C allocator for training on CPU, before the first tensor is made."""
    keep_freed_memory(saving=config.train.activation_checkpointing != "none")


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still allocate on its GPU, or in its share of the host's memory."""
    if is_gpu(device):
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _free_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """The peak of the bytes of tensors while `run()` runs, beyond those before it.

    On a CPU, where torch's allocator keeps no such count, temporary memory inside an operator is not counted.
    """
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with TensorBytes() as count:
        run()
    return count.peak


def kept_storages(block: nn.Module, *inputs: Any) -> list[torch.UntypedStorage]:
    """The storages that block(*inputs) keeps for its backward pass, without its outputs."""
    with TensorBytes() as count:
        outputs = block(*inputs)
    graph = [output.grad_fn for output in outputs]
    del outputs
    gc.collect()  # what only a cycle of objects still holds is not kept
    kept = count.living()
    del graph  # the outputs held it
    return kept


def moment_bytes_to_come(config: Config, strategy: Strategy) -> int:
    """Bytes that the first update adds on this rank's device: the state that the optimizer keeps for its parameters."""
    if strategy.optimizer.state:
        return 0
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in strategy.model.parameters())
    here = sum(part.nbytes for part in parts if part.device.type == strategy.ranks.device.type)
    return here * kept_numbers(config.model, config.train) // parameter_count(config.model)


class TensorBytes(TorchDispatchMode):
    """A context that counts the bytes of tensors that operators make in it; `peak` is the largest sum at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # Keyed by address, which another storage may have later.
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
        # The sum is computed each time, because FSDP empties and refills storages in place.
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.living()))
        return result

    def living(self) -> list[torch.UntypedStorage]:
        """Storages that were made in the context and still exist, in the order in which they were made."""
        return list(self._made.values())


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor))
    return [tensor.untyped_storage() for tensor in tensors]


def _free_host_memory() -> int:
    """Bytes that the system can provide, within the limits of this process's control groups (version 2)."""
    if not is_file(_MEMINFO):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = 1024 * _values(_MEMINFO)["MemAvailable:"]
    lines = _CGROUP.read_text().splitlines() if is_file(_CGROUP) else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for group in (_CGROUPS / own, *(_CGROUPS / own).parents):
        limit = group / "memory.max"
        if is_file(limit) and (most := limit.read_text().strip()) != "max":
            used = int((group / "memory.current").read_text())
            cached = _values(group / "memory.stat")["inactive_file"]
            free = min(free, int(most) - used + cached)
    return max(free, 0)


def _values(path: Path) -> dict[str, int]:
    """The names and numbers in a file of the kernel, such as memory.stat."""
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}
