"""What torch's idle threads take from those of the CPU kernels."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import time
import caduceus
import torch

torch.set_num_threads(2)
x = torch.zeros(200_000)
x += 1
before = time.process_time()
for _ in range(20):
    x += 1
    time.sleep(0.02)
print((time.process_time() - before) / 20)
"""


@pytest.mark.moderate
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of libgomp")
def test_threads_of_torch_do_not_spin_for_long_after_an_operation():
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True, env=environment)
    assert float(run.stdout) < 3e-3  # seconds of processor time; 5e-3 and more are spent where nobody sets a limit
