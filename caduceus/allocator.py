"""The C allocator's settings for training on CPU."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for its next allocations, in huge pages where the system grants
    them to who asks. To be called before the first tensor is made. Does nothing where libc is not glibc.

    By default glibc returns every large block to the system at once, so each activation of a few megabytes costs
    hundreds of page faults, in every step anew: a quarter of the time of a training step on CPU. Rows of a large tensor
    lie on pages of their own, and looking those up costs a scan some per cent.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates
