"""The programs that measure runs and datasets too large to have at hand, at small sizes: that they still run."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SMALL = {
    ("long_runs.py", 7): ("--steps", "2000", "--runs", "5"),
    ("opening.py", 4): ("--shards", "200", "--species", "2", "--ranks", "1", "--by-indexes", "20"),
    ("merging.py", 1): ("--species", "2", "--shards", "2"),
}
"""Program and rows of its table: options."""


@pytest.mark.slow
@pytest.mark.parametrize(("program", "rows"), SMALL)
def test_each_part_is_measured(program: str, rows: int) -> None:
    command = [sys.executable, REPOSITORY / "benchmarks" / program, *SMALL[program, rows]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + rows, done.stdout
