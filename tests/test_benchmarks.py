"""The programs for a GPU, where there is none: that they say so, and that they run at the smallest sizes."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
PROGRAMS = sorted(path.name for path in BENCHMARKS.glob("gpu_*.py") if "__main__" in path.read_text())

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)"),
]


def run(program: str, *options: str) -> str:
    """What it prints, with exit status 0, as if there were no GPU."""
    command = [sys.executable, str(BENCHMARKS / program), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_without_a_gpu_it_says_so(program):
    assert run(program).startswith("no GPU here: nothing to do")


def test_the_training_step_is_measured():
    sizes = ["--d-model", "8", "--layers", "1", "--lengths", "64", "--tokens", "128", "--repeats", "1"]
    told = run("gpu_step.py", "--device", "cpu", "--models", "ph", "ps", *sizes)
    rate = r"[\d,]+"
    assert re.search(
        f"\nceilings, measured: copy {rate} GB/s, exp2 {rate} Gexp/s, bf16 products {rate} GFLOP/s\n", told
    )
    for model in ("ph", "ps"):
        # Tokens/s, no memory of a GPU, blocks, share of the roofline, no graphs, the structure's tokens/s, their ratio.
        row = rf"\n\| {model} \| 64 \| 2 \| {rate} \| - \| 0 \+ 0 of 1 \| \d+% \| - \| {rate} \| [\d.]+ \|\n"
        assert re.search(row, told), told


def test_errors_of_gradients_stand_side_by_side():
    told = run("gradient_errors.py", "--device", "cpu", "--channels", "32", "--length", "8", "--states", "4")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("| ")]
    errors = {way: [abs(float(cell)) for cell in cells] for way, *cells in rows[1:]}
    for way in ("fp32", "fp16, tiles (TF32)", "bf16, tiles (TF32)", "bf16, in warps"):
        assert max(errors[way]) < (1e-5 if way == "fp32" else 0.1), told
    assert errors["bf16, in warps"] == errors["bf16, in warps, kept states"]
    assert errors["bf16, in warps"] != errors["bf16, tiles (TF32)"]


def test_the_sweep_ends_with_the_best_of_each_op():
    sizes = ["--channels", "2", "--length", "8", "--states", "1", "--repeats", "1", "--minutes", "0.1"]
    told = run("gpu_sweep.py", "--device", "cpu", *sizes)
    for op in ("scan", "convolution", "loss"):
        assert re.search(rf"\n{op}, best: .*: [\d.]+ ms, [\d.]+ times as fast\n", told), told
