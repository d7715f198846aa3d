"""Runs tests of tests/ops/interpreted, where Triton's kernels are interpreted on the CPU, in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).parent / "ops" / "interpreted"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process is such a one."""


def run_interpreted(selection: str, path: Path = INTERPRETED) -> None:
    """`selection` is pytest's marker expression."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    command = [sys.executable, "-m", "pytest", str(path), "-m", selection, "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
