"""The C allocator: settings for training on CPU, and freed memory for the system."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 2**25
"""Bytes of a block up to which it is kept when it is freed; glibc takes no larger threshold."""
LARGEST_KEPT_TO_SAVE = 2**22
"""The same for runs that save memory: activations of a long sequence are larger."""


def keep_freed_memory(saving: bool = False) -> None:
    """Let this process keep the memory that it frees, for its next allocations, in huge pages where the system grants
    them to who asks; larger blocks go back to the system. To be called before the first tensor is made. Does nothing
    where libc is not glibc.

    By default glibc returns blocks from 128 KiB on to the system at once, so each activation costs hundreds of page
    faults, in every step anew: a quarter of the time of a training step on CPU. Rows of a large tensor lie on pages of
    their own, and looking those up costs a scan some per cent. If large blocks stayed too, small ones would be cut out
    of them, and the process would come to hold up to three times the bytes of its tensors: it would take more memory
    with fewer activations. `saving` lowers the bound, for runs that recompute activations to save memory; the system
    clears the blocks that come and go, which takes up to a third of a step's time.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_TO_SAVE if saving else LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, -1)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates


def give_back_freed_memory() -> None:
    """Have the system take back, once, what the heap holds freed: after work of large pieces that is not done again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
