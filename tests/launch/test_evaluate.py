"""A verb of caduceus.evaluate as a job of this machine, and what is refused before there is one."""

import sys
from pathlib import Path

import numpy as np
import pytest

from caduceus.errors import UserError
from launch import evaluate
from tests import preloaded
from tests.conftest import REPOSITORY
from tests.evaluate.conftest import model_folder
from tests.slurm.small_runs import command

__all__ = ["model_folder"]


def write_sequences(path: Path, count: int = 20) -> Path:
    rows = ["".join(np.random.default_rng(n).choice(list("ACGT"), 12)) for n in range(count)]
    path.write_text("\n".join(["sequence", *rows]) + "\n")
    return path


@pytest.mark.slow
def test_a_local_job_shares_the_work_and_gives_what_one_process_gives(tmp_path: Path, model_folder) -> None:
    write_sequences(tmp_path / "in.csv", 4100)  # more than one part holds
    words = ["embed", "--model", model_folder("ps"), "--input", "in.csv"]
    alone = [sys.executable, REPOSITORY / "launch" / "evaluate.py", *words, "--out", "one.npz", "--cluster", "debug"]
    preloaded.run(alone, check=True, cwd=tmp_path)
    request = ["--cluster", "local", "--tasks-per-node", "2"]
    both = command("evaluate", tmp_path, *words, "--out", "two.npz", *request)
    assert both.returncode == 0 and "two.npz: written" in both.stdout, both.stdout + both.stderr
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["embeddings"], two["embeddings"])
    failing = command("evaluate", tmp_path, *words, "--layer", "9", "--out", "no.npz", *request)
    assert failing.returncode == 2 and "\nerror: --layer: the model has 0" in failing.stdout, failing.stdout
    assert not (tmp_path / "no.npz").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "VERB: say what to run"),
        (["embed"], r"the following arguments are required: --model"),
        (["embed", "--model", ".", "--out", "o.npz", "--input", "no.fa"], r"--input: no\.fa: no such file"),
        (["embed", "--model", ".", "--out", "no/o.npz", "--input", "in.csv"], r"--out: .*/no: there is no such folder"),
        (["embed", "--model", ".", "--out", "o.npz", "--input", "in.csv", "--chain", "2"], "chain: is for training"),
        (["heldout", "--run", "no", "--nodes", "2"], "--run: no: no such file"),
        (
            ["embed", "--model", ".", "--out", "o.npz", "--input", "in.csv", "--partition", "x"],
            "no SLURM on this machine",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_there_is_a_job(tmp_path: Path, monkeypatch, words, message) -> None:
    write_sequences(tmp_path / "in.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--cluster", "cpu", *words])
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main()
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["in.csv"]
