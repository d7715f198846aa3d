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
# A multiprocessor has 65,536 registers, so a block of 128 threads at R registers is one of 512 / R: 4 at 128, 3 at 168.
# More than these means that the occupancy has changed of what is compiled here; in fp32 odd sizes may take more.
REGISTERS = {
    "chunk_state": 128,
    "chunk_carry": 64,
    "scan_forward": 128,
    "chunk_adjoint": 128,
    "scan_replay": 128,
    "gather_pieces": 32,
    "scan_backward": 168,
    "scatter_pieces": 32,
    "conv_forward": 96,
    "conv_backward": 128,
    "add_norm_forward": 168,
    "add_norm_backward": 168,
    "gated_norm_forward": 128,
    "gated_norm_backward": 168,
    "cross_entropy_forward": 128,
    "cross_entropy_backward": 168,
}
MORE_STATES = REGISTERS | dict.fromkeys(("chunk_state", "scan_forward", "chunk_adjoint", "scan_replay"), 168)
SCAN = ("chunk_state", "chunk_carry", "scan_forward", "chunk_adjoint", "scan_replay", "gather_pieces", "scan_backward")
SCAN += ("scatter_pieces",)
OTHERS = ("conv_forward", "conv_backward", "add_norm_forward", "add_norm_backward")
OTHERS += ("cross_entropy_forward", "cross_entropy_backward")
GATED = ("gated_norm_forward", "gated_norm_backward")
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
        assert found["registers"] <= registers[found["kernel"]], found
        assert not found["narrow_products"], f"has an offset that wraps at 2^31: {found}"
        assert not found["atomics"], f"adds in whatever order threads come: {found}"
        assert found["fused"], f"multiplies and adds in two instructions: {found}"


def test_published_models_compile_without_spills():
    """With sequences alone, in batches and shared by ranks."""
    check(compiled((90,), "bf16", "published"), REGISTERS)


@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_an_older_gpu_and_another_type_compile_without_spills(element):
    check(compiled((80,), element, "one"), REGISTERS)


def test_packed_odd_giant_and_smallest_sequences_compile_without_spills():
    check(compiled((90,), "bf16", "rest"), REGISTERS)


@pytest.mark.parametrize(("capability", "element"), [(80, "fp32"), (90, "bf16")])
def test_mamba2s_gated_norm_compiles_without_spills(capability, element):
    check(compiled((capability,), element, "gated", GATED), REGISTERS)


@pytest.mark.parametrize(("capability", "states"), [(80, 32), (90, 64)])
def test_more_states_compile_without_spills(capability, states):
    """Most kernels hold all states of a channel in a thread's registers, of which there are 255."""
    check(compiled((capability,), "bf16", str(states), SCAN), MORE_STATES)
