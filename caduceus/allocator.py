"""The C allocator: settings for training on a CPU, and giving freed memory back to the system."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 2**25
"""Bytes of a block up to which it is kept when it is freed; glibc takes no larger threshold."""
LARGEST_KEPT_TO_SAVE = 2**22
"""The same for runs that save memory: activations of a long sequence are larger."""


def keep_freed_memory(saving: bool = False) -> None:
    """Let this process keep the memory that it frees for its next allocations, in huge pages where the system grants
    them on request. Larger blocks go back to the system. Call it before the first tensor is made. Without glibc it does
    nothing.

    By default glibc returns blocks of 128 KiB or more to the system at once, so each activation costs hundreds of page
    faults in every step: a quarter of the time of a training step on a CPU. Each row of a large tensor lies on its own
    pages, and looking these up costs a scan a few per cent. If large blocks stayed too, small ones would be cut out of
    them, and the process would come to hold up to three times the bytes of its tensors: it would take more memory with
    fewer activations. `saving` lowers the bound, for runs that recompute activations to save memory; the system clears
    the blocks that come and go, which takes up to a third of a step's time.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_TO_SAVE if saving else LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, -1)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates


def give_back_freed_memory() -> None:
    """Return the freed memory of the heap to the system once: after work on large pieces that is not repeated."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
