"""All that the published models launch, compiled for GPUs that need not be here: no spills, bounded resources."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.tools import has_tools

ROOT = Path(__file__).parents[2]
# A multiprocessor has 65,536 registers, so a block of 128 threads at R registers is one of 512 / R: 4 at 128, 2 at 255.
# Bounds are what ptxas of Triton 3.6 and 3.9 gives, rounded up: more means that the kernel's occupancy has changed.
REGISTERS = {
    "chunk_state": 64,
    "chunk_carry": 64,
    "scan_forward": 128,
    "chunk_adjoint": 64,
    "scan_replay": 128,
}
SCAN = ("chunk_state", "chunk_carry", "scan_forward", "chunk_adjoint", "scan_replay", "gather_pieces", "scan_backward")
SCAN += ("scatter_pieces",)
OTHERS = ("conv_forward", "conv_backward", "add_norm_forward", "add_norm_backward")
OTHERS += ("cross_entropy_forward", "cross_entropy_backward")
MORE_STATES = {"chunk_state": 168, "chunk_carry": 64, "chunk_adjoint": 168}
SHARED = 48 * 1024  # what a block gets without asking for more


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_tools(), reason="no triton here that brings ptxas and cuobjdump (Linux only)"),
]


def compiled(capabilities: tuple[int, ...], element: str, launches: str, kernels: tuple[str, ...] = ()) -> list[dict]:
    """What became of each kernel; that all were launched is asserted."""
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:triton.knobs",
        "-m",
        "tests.ops.aot",
        ",".join(map(str, capabilities)),
        element,
        launches,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_") or k == "TRITON_CACHE_DIR"}
    result = subprocess.run([*command, *kernels], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    launched = {(kernel["kernel"], kernel["capability"]) for kernel in found}
    assert launched == set(itertools.product(kernels or (*SCAN, *OTHERS), capabilities))
    return found


def check(kernels: list[dict], registers: dict[str, int]) -> None:
    for found in kernels:
        assert found["stack"] == found["local"] == 0, f"spills: {found}"
        assert found["shared"] <= SHARED, found
        assert found["registers"] <= registers.get(found["kernel"], 255), found
        assert not found["narrow_products"], f"has an offset that wraps at 2^31: {found}"
        assert not found["atomics"], f"adds in whatever order threads come: {found}"
        assert found["fused"], f"multiplies and adds in two instructions: {found}"


@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_published_models_compile_without_spills(element):
    """With sequences alone, in batches and shared by ranks."""
    check(compiled((80, 90), element, "published"), REGISTERS)


def test_packed_giant_and_smallest_sequences_compile_without_spills():
    check(compiled((90,), "bf16", "rest"), REGISTERS)


@pytest.mark.parametrize(("capabilities", "states"), [((90,), 32), ((80, 90), 64)])
def test_more_states_compile_without_spills(capabilities, states):
    """Most kernels hold all states of a channel in a thread's registers, of which there are 255."""
    check(compiled(capabilities, "bf16", str(states), SCAN), MORE_STATES)
