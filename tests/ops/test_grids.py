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
WAVE = 4 * 132 // 2
REPLAYED = ("gather_pieces", "scan_replay", "scan_backward", "scatter_pieces")


@pytest.mark.slow
def test_grids_fit_and_only_replays_take_more_launches_for_more_bases() -> None:
    """A backward pass replays what fits into 2 GiB at a time, 4 bytes of 2 directions, 16 states and 512 channels for
    one of eight bases, and of that what fills an H100, whose 132 multiprocessors have four programs of half the
    channels each."""
    command = [sys.executable, "-m", "tests.ops.grids"]
    steps = [json.loads(line) for line in subprocess.check_output(command, cwd=REPOSITORY, text=True).splitlines()]
    assert len(steps) == 12
    others: dict[tuple[int, bool], Counter] = {}
    for step in steps:
        for name, grid in step["launches"]:
            assert all(0 < blocks <= most for blocks, most in zip(grid, LARGEST, strict=False)), (name, grid, step)
        counts = Counter(name for name, _ in step["launches"])
        chunks = next(grid[0] for name, grid in step["launches"] if name == "chunk_state") // 2
        pieces = next(grid[1] for name, grid in step["launches"] if name == "gather_pieces")
        waves = 2**31 // (WAVE * pieces * 4 * 2 * 16 * 512)
        assert waves > 0
        segments = math.ceil(chunks / (waves * WAVE))
        assert {counts.pop(name) for name in REPLAYED} == {2 * segments}, step["length"]
        assert counts["scan_forward"] == 2
        assert counts == others.setdefault((step["streams"], step["shared"]), counts), step["length"]


@pytest.mark.parametrize("length", [16_384, 100_000, 131_072, 160_000, 2**20, 2**20 + 2**17, 2**23])
def test_chunks_fill_a_gpu_at_every_length(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Programs of a scan on an H100: they take up most of the time of all places."""
    import torch

    from caduceus.ops.triton import device

    monkeypatch.setattr(device, "multiprocessors", lambda _: 132)
    for runs, resident in ((1, 4), (2, 4), (1, 9)):
        chunk = device.tokens_per_program(runs, length, 2, resident, torch.device("cpu"))
        waves = math.ceil(runs * 2 * math.ceil(length / chunk) / (resident * 132))
        assert chunk % 8 == 0 and runs * 2 * length / (waves * resident * 132 * chunk) > (
            0.95 if length >= 2**16 else 0.85
        )
