"""What is launched for sequences of up to 8 million bases, without a GPU: how much, and in grids that CUDA takes."""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("triton", reason="triton is not installed (Linux only)")

LARGEST = (2**31 - 1, 65_535, 65_535)
"""Blocks that CUDA allows along each axis of a grid."""
REPLAYED = ("gather_pieces", "scan_replay", "scan_backward", "scatter_pieces")


@pytest.mark.slow
def test_grids_fit_and_only_replays_take_more_launches_for_more_bases() -> None:
    """A backward pass replays what fits into 2 GiB at a time: 4 bytes of 2 directions, 16 states and 512 channels for
    one of eight bases."""
    command = [sys.executable, "-m", "tests.ops.grids"]
    steps = [json.loads(line) for line in subprocess.check_output(command, cwd=REPOSITORY, text=True).splitlines()]
    assert len(steps) == 12
    others: dict[tuple[int, bool], Counter] = {}
    for step in steps:
        for name, grid in step["launches"]:
            assert all(0 < blocks <= most for blocks, most in zip(grid, LARGEST, strict=False)), (name, grid, step)
        counts = Counter(name for name, _ in step["launches"])
        segments = math.ceil(step["length"] * step["streams"] / (2**31 // (4 * 2 * 16 * 512 // 8)))
        assert {counts.pop(name) for name in REPLAYED} == {2 * segments}, step["length"]
        assert counts["scan_forward"] == 2
        assert counts == others.setdefault((step["streams"], step["shared"]), counts), step["length"]
