"""The search of benchmarks/gpu_sweep.py, on an op that stands for one: the kernels are timed on a GPU only."""

import argparse
import sys
import time
from pathlib import Path

import pytest
import torch

from caduceus.ops.triton import device as launch
from caduceus.ops.triton import scan_launches

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import gpu_sweep


@pytest.fixture
def options(device) -> argparse.Namespace:
    return argparse.Namespace(device=device.type, repeats=1)


def sweep(monkeypatch: pytest.MonkeyPatch, options: argparse.Namespace, minutes: float = 1) -> None:
    """PIECE 4 is fastest but wrong, 16 does not run; of the warps, 8 and PIECE as it is are fastest."""

    def run() -> list[torch.Tensor]:
        if scan_launches.PIECE == 16:
            raise ValueError("chunk: must be a multiple of 16")
        return [torch.full((3,), 1.0 if scan_launches.PIECE == 8 else 1.1)]

    def measure(run, options) -> gpu_sweep.Timing:
        cost = scan_launches.PIECE / launch.LAUNCH["num_warps"]
        return gpu_sweep.Timing(cost, {"kernel": cost / 2})

    monkeypatch.setattr(gpu_sweep, "measure", measure)
    pieces = gpu_sweep.Tunable("PIECE", (4, 8, 16), gpu_sweep.constants(scan_launches, "PIECE"))
    monkeypatch.setitem(gpu_sweep.TUNABLES, "scan", [pieces, gpu_sweep.WARPS])
    gpu_sweep.sweep("scan", run, options, time.monotonic() + 60 * minutes)


def test_the_best_of_what_is_right_is_found_and_nothing_stays_changed(monkeypatch, capsys, options):
    before = scan_launches.PIECE, dict(launch.LAUNCH), launch.WARPS, launch.CHANNELS
    sweep(monkeypatch, options)
    assert (scan_launches.PIECE, dict(launch.LAUNCH), launch.WARPS, launch.CHANNELS) == before
    told = capsys.readouterr().out
    assert "| PIECE | 4 | - | WRONG: differs by 1.0e-01 |" in told
    assert "| PIECE | 16 | - | does not run: chunk: must be a multiple of 16 |" in told
    assert "scan, best: WARPS 8: 1000.000 ms, 2.00 times as fast" in told
    assert "| kernel | 1000.000 | 500.000 |" in told


def test_it_ends_with_its_time(monkeypatch, capsys, options):
    sweep(monkeypatch, options, minutes=0)
    told = capsys.readouterr().out
    assert "is over" in told and "scan, best: as it is: 2000.000 ms" in told and "| PIECE |" not in told


def test_the_launches_of_a_run_are_timed_by_kernel(options):
    sizes = {"streams": 1, "batch": 1, "length": 3, "channels": 2, "states": 1}
    run = gpu_sweep.scan_op(argparse.Namespace(**vars(options), **sizes))
    found = gpu_sweep.measure(run, options)
    assert {"scan_forward_kernel", "scan_backward_kernel"} <= found.kernels.keys()
    assert 0 < sum(found.kernels.values()) < found.seconds
