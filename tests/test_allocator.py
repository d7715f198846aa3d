import resource
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from caduceus.allocator import keep_freed_memory

keep_freed_memory()
for _ in range(10):
    torch.zeros(2**24)  # 64 MB; until the heap has room beside what small blocks were cut from it meanwhile
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    pages = 2**26 // resource.getpagesize()
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)
    assert int(run.stdout) < pages // 100
