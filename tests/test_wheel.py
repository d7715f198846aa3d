"""What `pip install` gives someone who has no checkout."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
import caduceus.train.trainer, caduceus.evaluate.heldout, caduceus.hub
import data_prep.shard_genome, launch.slurm
for module in (caduceus, data_prep, launch):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
"""


@pytest.mark.slow
def test_a_wheel_installs_and_imports(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files behind
    for name in ("caduceus", "data_prep", "launch"):
        shutil.copytree(REPOSITORY / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", source], check=True)
    (wheel,) = (tmp_path / "wheels").glob("caduceus-*.whl")
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    subprocess.run([sys.executable, "-c", IMPORTS, str(target)], check=True, cwd=tmp_path)
