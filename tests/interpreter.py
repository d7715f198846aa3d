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
OF_MODELS = ("test_triton_golden.py", "test_triton_model.py")
"""Tests of whole models, which run beside those of the ops."""


def run_interpreted(selection: str, *names: str) -> None:
    """Run these files, or all: `selection` is pytest's marker expression. No plugins are loaded that are not used."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    paths = [str(INTERPRETED / name) for name in names] or [str(INTERPRETED)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *paths,
        "-m",
        selection,
        "-p",
        "pytest_timeout",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
