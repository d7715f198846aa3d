"""What a process of training on a CPU really holds, against what is counted and said."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "resident.py"


def trained(mode: str, free: int = 0) -> dict[str, Any]:
    run = subprocess.run([sys.executable, str(SCRIPT), mode, str(free)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_recomputation_lowers_the_resident_peak_as_it_lowers_what_is_counted() -> None:
    none, scan, block = (trained(mode) for mode in ("none", "scan", "block"))
    auto = trained("auto", free=scan["counted"] * 10 // 9 + 2**20)
    for found in (none, scan, block, auto):
        # Beside the tensors: scratch memory of the kernels, the optimizer, and what small blocks leave between them.
        assert 0.95 * found["counted"] < found["resident"] < 1.3 * found["counted"], found
    for more, fewer in ((none, scan), (scan, block)):
        assert more["resident"] - fewer["resident"] > 0.6 * (more["counted"] - fewer["counted"])
    (said,) = auto["said"]
    assert auto["resident"] < 1.25 * said
    assert block["resident"] < auto["resident"] < none["resident"]
