"""From tensors to what the kernels take, and running kernels on threads."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba.core import event
from torch import Tensor

_log = logging.getLogger(__name__)


def lead(tensor: Tensor | None, axes: int) -> Tensor | None:
    return None if tensor is None else tensor[(None,) * axes]


def copied(parameter: Tensor) -> np.ndarray:
    """A copy: `numpy` pins a tensor's memory for good, and FSDP frees that of parameters between uses."""
    return parameter.clone(memory_format=torch.contiguous_format).numpy()


def flattened(tensor: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """A tensor's memory as a flat array, and its strides over (P, S, B, L), 0 for a leading axis that it lacks.

    No copy as long as neighbouring channels are neighbours in memory, as in a slice of a projection's output.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        tensor = tensor.contiguous()
    strides = tensor.stride()[:-1]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
    return flat.numpy(), (0,) * (4 - len(strides)) + strides


# Threads: our own, because numba's pools abort the process when it forks or two threads call them.


def run_kernel(kernel: Callable, items: int, *arguments) -> None:
    """Run a kernel's items in equal shares on torch's number of threads, this one among them."""
    shares = max(1, min(torch.get_num_threads(), items))
    bounds = [items * share // shares for share in range(shares + 1)]
    others = [_pool(shares).submit(kernel, *bounds[i : i + 2], *arguments) for i in range(1, shares)]
    kernel(*bounds[:2], *arguments)
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="caduceus-cpu")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


class _CompilationNotice(event.Listener):
    """Says once that compilation has begun, since it takes a while and is not repeated."""

    said = False

    def on_start(self, event):
        if not self.said and event.data["dispatcher"].py_func.__module__.startswith(f"{__package__}."):
            self.said = True
            _log.info(
                "compiling the CPU kernels, once for this copy of the package: about 20 s of one core, "
                "so minutes on a machine that is busy"
            )

    def on_end(self, event):
        pass


event.register("numba:compile", _CompilationNotice())
