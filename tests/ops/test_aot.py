"""The Triton kernels compiled ahead of time for GPUs that need not be here: no spills, bounded resources."""

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
    "scan_backward": 255,
}
MORE_STATES = {"chunk_state": 168, "chunk_carry": 64, "scan_forward": 255, "chunk_adjoint": 168, "scan_replay": 255}
SCAN = tuple(REGISTERS)
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


def compiled(capability: int, element: str, states: int, kernels: tuple[str, ...] = ()) -> dict[str, dict]:
    command = [sys.executable, str(PROGRAM), str(capability), element, str(states), *kernels]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return {row.pop("kernel"): row for row in rows}


def check(kernels: dict[str, dict], registers: dict[str, int]) -> None:
    for name, found in kernels.items():
        assert found["stack"] == found["local_memory"] == 0, f"{name} spills: {found}"
        assert found["shared"] <= SHARED, f"{name}: {found}"
        assert found["registers"] <= registers.get(name.partition(" of ")[0], 255), f"{name}: {found}"
        assert not found["narrow_products"], f"{name} has an offset that wraps at 2^31: {found}"


@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_published_sizes_compile_without_spills(capability, element):
    """With the variants for packed sequences and for sequences shared by ranks."""
    kernels = compiled(capability, element, 16)
    assert len(kernels) == 20
    check(kernels, REGISTERS)


@pytest.mark.parametrize(("capability", "states"), [(90, 32), (80, 64), (90, 64)])
def test_more_states_compile_without_spills(capability, states):
    """Most kernels hold all states of a channel in a thread's registers, of which there are 255."""
    kernels = compiled(capability, "bf16", states, SCAN)
    assert len(kernels) == len(SCAN)
    check(kernels, MORE_STATES)
