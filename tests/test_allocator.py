import resource
import subprocess
import sys
from pathlib import Path

import pytest


def _huge_pages() -> str:
    """As in "always [madvise] never"; nothing where the system knows none."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text() if setting.exists() else "[never]"


SCRIPT = """
import resource
import torch
from caduceus.allocator import keep_freed_memory

keep_freed_memory()
for _ in range(10):
    torch.zeros(2**22)  # 16 MiB; until the heap has room beside what small blocks were cut from it meanwhile
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.zeros(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.moderate
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    pages = 2**24 * 4 // resource.getpagesize()
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    assert int(run.stdout) < pages // 100


@pytest.mark.moderate
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
@pytest.mark.parametrize(("saving", "largest"), [(False, 2**25), (True, 2**22)])
def test_larger_blocks_go_back_to_the_system(saving: bool, largest: int) -> None:
    script = f"""
import ctypes, os
from caduceus.allocator import keep_freed_memory

keep_freed_memory(saving={saving})
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
for size in ({largest} // 2, {largest} + 4096):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    before = resident()
    libc.free(block)
    print(before - resident())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    kept, returned = map(int, run.stdout.split())
    assert kept < largest // 20 and returned >= largest


@pytest.mark.moderate
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="of Linux")
@pytest.mark.skipif("[never]" in _huge_pages(), reason="switched off in this system")
def test_large_tensors_lie_in_huge_pages():
    script = """
import torch
import caduceus.train.trainer
from caduceus.allocator import keep_freed_memory

keep_freed_memory()
tensor = torch.zeros(2**24)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(run.stdout) >= 2**15  # kB, of 2^16: the rest may find no free huge page
