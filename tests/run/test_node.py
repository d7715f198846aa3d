"""Where a process keeps what is of its node alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import os, sys, types
def train(config):
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from triton.runtime.cache import get_cache_manager
    told = get_cache_manager("ab12").put(b"", "kernel"), cache_dir()
    os.write(1, " ".join((os.environ["RANK"], os.environ["TRITON_CACHE_DIR"], *told)).encode() + b"\\n")
    return 0
sys.modules["caduceus.train.trainer"] = types.SimpleNamespace(train=train)
from caduceus.train.__main__ import main
sys.exit(main())
"""


@pytest.mark.slow
def test_compilers_caches_of_a_plain_torchrun_lie_on_the_node(tmp_path):
    """And not in a home that all nodes share: in each rank, Triton and inductor are asked where they write."""
    pytest.importorskip("triton", reason="triton is not installed (Linux only)")
    script, home, disk = tmp_path / "rank.py", tmp_path / "home", tmp_path / "disk"
    script.write_text(RANK)
    home.mkdir()
    disk.mkdir()
    compilers = ("TRITON_", "TORCHINDUCTOR_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(compilers)}
    environment |= {"HOME": str(home), "TMPDIR": str(disk), "OMP_NUM_THREADS": "1"}
    train = [str(script), "--config", "ps-1k"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def places(*command: str, **given: str) -> list[list[str]]:
        done = subprocess.run([sys.executable, *command], env=environment | given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return sorted(line.split() for line in done.stdout.splitlines())

    folder = disk / f"caduceus-{os.getuid()}"
    told = places(*torchrun, *train)
    assert [rank for rank, *_ in told] == ["0", "1"]
    for _, cache, kernel, inductor in told:
        assert cache == str(folder / "triton") and folder / "triton" in Path(kernel).parents
        assert inductor == str(folder / "inductor")
    assert not [path for path in home.rglob("*") if path.is_file()]
    given = str(tmp_path / "given")
    ((_, cache, *_),) = places(*train, WORLD_SIZE="2", RANK="0", TRITON_CACHE_DIR=given)
    assert cache == given, "what is set stays"
