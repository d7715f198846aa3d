"""benchmarks/gpu_correctness.py itself, which has to be right before there is a GPU: all but its giant tensors."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import gpu_correctness
from gpu_ops import norm_cases


def run(monkeypatch: pytest.MonkeyPatch, device: torch.device, *parts: str) -> int:
    """The program's exit status."""
    monkeypatch.setattr(sys, "argv", ["gpu_correctness.py", "--device", device.type, "--only", *parts])
    with pytest.raises(SystemExit) as ended:
        gpu_correctness.main()
    return ended.value.code


@pytest.mark.slow
def test_every_op_is_right_in_the_type_of_training(monkeypatch, capsys, device):
    monkeypatch.setattr(gpu_correctness, "OPS", {torch.bfloat16: gpu_correctness.OPS[torch.bfloat16]})
    status = run(monkeypatch, device, "ops")
    told = capsys.readouterr().out
    assert status == 0 and "all right" in told, told
    for op in ("scan", "convolution", "RMSNorm", "add + RMSNorm", "add + LayerNorm", "head + loss"):
        assert f"\n| {op}, " in told


@pytest.mark.slow
def test_the_other_parts_are_right(monkeypatch, capsys, device):
    monkeypatch.setattr(gpu_correctness, "NAMES", ("mamba_unidirectional",))
    monkeypatch.setattr(gpu_correctness, "GOLDEN", {torch.bfloat16: gpu_correctness.GOLDEN[torch.bfloat16]})
    status = run(monkeypatch, device, "golden", "bits", *(["far"] if device.type == "cpu" else []))
    told = capsys.readouterr().out
    assert status == 0 and "all right" in told, told
    assert "\n| mamba_unidirectional | bfloat16 | " in told
    for twice in ("scan, ", "step of Caduceus-Ph ", "step of Caduceus-PS "):
        assert f"\n| {twice}" in told


def test_what_is_wrong_is_told(monkeypatch, capsys, device):
    monkeypatch.setattr(gpu_correctness, "every_case", norm_cases)
    monkeypatch.setattr(gpu_correctness, "OPS", {torch.float32: 0.0})
    assert run(monkeypatch, device, "ops") == 1
    told = capsys.readouterr().out
    assert "| WRONG |" in told and "are wrong\n" in told
