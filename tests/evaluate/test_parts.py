"""Work in parts: cut in order, kept whole, and shared by the ranks of torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from caduceus.evaluate.parts import cut
from tests.conftest import REPOSITORY


def test_parts_are_cut_in_order_by_size_and_number() -> None:
    assert cut([5, 1, 1, 9, 2], lambda size: size, 6, 3) == [[5, 1], [1], [9], [2]]
    assert cut([1] * 5, lambda size: size, 100, 2) == [[1, 1], [1, 1], [1]]
    assert cut([], len, 1, 1) == []


@pytest.mark.slow
def test_ranks_share_the_work_and_one_writes(tmp_path: Path, model_folder, evaluate) -> None:
    rows = ["".join(np.random.default_rng(n).choice(list("ACGT"), 10)) for n in range(4100)]  # more than one part holds
    (tmp_path / "in.csv").write_text("\n".join(["sequence", *rows]))
    words = ["embed", "--model", str(model_folder("ps")), "--input", str(tmp_path / "in.csv"), "--out"]
    evaluate(*words, tmp_path / "one.npz")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "caduceus.evaluate", *words, str(tmp_path / "two.npz")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["embeddings"], two["embeddings"])
    assert not (tmp_path / "two.npz.parts").exists()
