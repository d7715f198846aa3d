"""All that the published models launch, compiled for GPUs that need not be here: no spills, bounded resources."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.tools import RUNS, SCAN, has_tools

ROOT = Path(__file__).parents[2]
# A multiprocessor has 65,536 registers, so a block of 128 threads at R registers is one of 512 / R: 4 at 128, 3 at 168.
# More than these means that the occupancy has changed of what is compiled here; in fp32 odd sizes may take more.
REGISTERS = {
    "chunk_state": 128,
    "chunk_carry": 64,
    "scan_forward": 128,
    "chunk_adjoint": 128,
    "chunk_adjoint_dz": 128,
    "scan_replay": 128,
    "scan_keep": 128,
    "gather_pieces": 32,
    "scan_backward": 168,
    "scatter_pieces": 32,
    "conv_forward": 96,
    "conv_backward": 128,
    "add_norm_forward": 168,
    "add_norm_backward": 168,
    "gated_norm_forward": 128,
    "gated_norm_backward": 128,
    "ssd_chunk_state": 96,
    "ssd_carry": 96,
    "ssd_output": 255,
    "ssd_input_gradient": 255,
    "ssd_state_gradient": 255,
    "cross_entropy_forward": 128,
    "cross_entropy_backward": 168,
}
MORE_STATES = REGISTERS | dict.fromkeys(
    ("chunk_state", "scan_forward", "chunk_adjoint", "chunk_adjoint_dz", "scan_replay", "scan_keep"), 168
)
OTHERS = ("conv_forward", "conv_backward", "add_norm_forward", "add_norm_backward")
OTHERS += ("cross_entropy_forward", "cross_entropy_backward")
BEYOND = {"d49d4ed8b992373e4657f238", "ff4f610cc87636b94ce96354"}
"""Keys of the two kernels on record of Triton 3.6.0 that do not keep to the bounds: ssd_state_gradient needs more
than a thread's 255 registers and spills 24 bytes, and gated_norm_backward in fp32 takes 140 registers instead of 128. A
kernel that changes has another key."""
SHARED = 48 * 1024  # what a block gets without asking for more


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_tools(), reason="no triton here that brings ptxas and cuobjdump (Linux only)"),
]


def compiled(*arguments: str) -> list:
    """What the program told of the kernels, on record or compiled now, a line at a time."""
    command = [sys.executable, "-W", "error::UserWarning:triton.knobs", "-m", "tests.ops.aot", *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_") or k == "TRITON_CACHE_DIR"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(kernels: list[dict], registers: dict[str, int]) -> None:
    for found in (kernel for kernel in kernels if kernel.get("key") not in BEYOND):
        assert found["stack"] == found["local"] == 0, f"spills: {found}"
        assert found["shared"] <= SHARED, found
        assert found["registers"] <= registers[found["kernel"]], found
        assert not found["narrow_products"], f"has an offset that wraps at 2^31: {found}"
        assert not found["atomics"], f"adds in whatever order threads come: {found}"
        assert found["fused"], f"multiplies and adds in two instructions: {found}"


def most_registers(run: str) -> dict[str, int]:
    return MORE_STATES if run.isdecimal() else REGISTERS


@pytest.fixture(scope="module")
def kernels_of_runs() -> dict[tuple[str, ...], list[dict]]:
    return dict(zip(RUNS, compiled("--runs"), strict=True))


@pytest.mark.parametrize("run", RUNS, ids=["-".join(run[:3]) for run in RUNS])
def test_kernels_compile_without_spills(kernels_of_runs, run):
    """Those of the published models, of sequences alone, in batches and shared by ranks, on two GPUs, with two types;
    packed, odd, giant and smallest sequences; and more states, which most kernels hold in a thread's 255 registers."""
    found = kernels_of_runs[run]
    assert {kernel["kernel"] for kernel in found} == set(run[3:] or (*SCAN, *OTHERS))
    check(found, most_registers(run[2]))


RESIDENT = {"chunk_state", "scan_forward", "chunk_adjoint", "chunk_adjoint_dz", "scan_replay", "scan_keep"}
"""Kernels of which so many blocks share a multiprocessor as the choice of chunks reckons with; scan_backward, whose
blocks are of one direction and of half the channels, as well where its sums stay in a warp."""


def test_as_many_blocks_share_a_multiprocessor_as_launches_reckon_with(kernels_of_runs):
    check_blocks(kernels_of_runs[RUNS[1]])


def check_blocks(kernels: list[dict]) -> None:
    from caduceus.ops.triton import conv, device, scan_launches

    least = dict.fromkeys((*RESIDENT, "scan_backward"), scan_launches.RESIDENT) | {"conv_backward": conv.RESIDENT}
    found = [kernel for kernel in kernels if kernel["kernel"] in least]
    assert {kernel["kernel"] for kernel in found} == set(least)
    for kernel in found:
        per_thread = -(-kernel["registers"] // 8) * 8
        blocks = min(65_536 // (32 * device.WARPS * per_thread), 164 * 1024 // (kernel["shared"] + 1024))
        assert blocks >= least[kernel["kernel"]], kernel


def test_a_kernel_on_record_is_what_is_compiled():
    """Another one each day."""
    from tests.ops import record

    known = record.load()
    if not known:
        pytest.skip("no record of this release of triton: `make kernels` writes one")
    key = sorted(known)[datetime.date.today().toordinal() % len(known)]
    again = {kernel.pop("key"): kernel for kernel in compiled("--afresh", key)}
    assert again == {key: known[key]}
