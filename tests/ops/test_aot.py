"""All that the published models launch, compiled for GPUs that need not be here: no spills, bounded resources."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "aot.py"
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


def has_tools() -> bool:
    if find_spec("triton") is None:
        return False
    binaries = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    return all((binaries / name).exists() for name in ("ptxas", "cuobjdump"))


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_tools(), reason="no triton here that brings ptxas and cuobjdump (Linux only)"),
]


def compiled(capability: int, element: str, launches: str, kernels: tuple[str, ...] = ()) -> list[dict]:
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:triton.knobs",
        str(PROGRAM),
        str(capability),
        element,
        launches,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_") or k == "TRITON_CACHE_DIR"}
    result = subprocess.run([*command, *kernels], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(kernels: list[dict], registers: dict[str, int]) -> None:
    for found in kernels:
        assert found["stack"] == found["local_memory"] == 0, f"spills: {found}"
        assert found["shared"] <= SHARED, found
        assert found["registers"] <= registers.get(found["kernel"], 255), found
        assert not found["narrow_products"], f"has an offset that wraps at 2^31: {found}"
        assert found["fused"], f"multiplies and adds in two instructions: {found}"


@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_published_models_compile_without_spills(capability, element):
    """With sequences alone, in batches and shared by ranks."""
    kernels = compiled(capability, element, "published")
    assert {found["kernel"] for found in kernels} == {*SCAN, *OTHERS}
    check(kernels, REGISTERS)


def test_packed_and_giant_sequences_compile_without_spills():
    kernels = compiled(90, "bf16", "rest", (*SCAN, "conv_forward", "conv_backward"))
    assert {found["kernel"] for found in kernels} == {*SCAN, "conv_forward", "conv_backward"}
    check(kernels, REGISTERS)


@pytest.mark.parametrize(("capability", "states"), [(90, 32), (80, 64), (90, 64)])
def test_more_states_compile_without_spills(capability, states):
    """Most kernels hold all states of a channel in a thread's registers, of which there are 255."""
    kernels = compiled(capability, "bf16", str(states), SCAN)
    assert {found["kernel"] for found in kernels} == set(SCAN)
    check(kernels, MORE_STATES)
