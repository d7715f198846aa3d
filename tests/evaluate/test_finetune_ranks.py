"""Fine-tuning on several ranks: as in one process, to rounding."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest

from caduceus.evaluate.finetune import finetune
from caduceus.evaluate.labelled import LabelledTable
from caduceus.evaluate.model import Runner
from caduceus.run.directory import RunDirectory
from tests import preloaded
from tests.conftest import REPOSITORY
from tests.distributed.ranks import start_ranks
from tests.evaluate.test_finetune import options, write_table


def told_by_ranks(command: list[str]) -> str:
    """All that two processes print which find each other by their environment, as torchrun's do."""
    python, *words = command
    ranks = start_ranks([[python, "-m", "caduceus.evaluate", *words]] * 2, stdout=PIPE, stderr=PIPE)
    told = [rank.communicate(timeout=600) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    return "".join(output + errors for output, errors in told)


def told_by_job(command: list[str]) -> str:
    """All that a job of two local tasks prints."""
    python, *words = command
    job = [python, str(REPOSITORY / "launch" / "evaluate.py"), "--cluster", "local", "--tasks-per-node", "2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = preloaded.run(job, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("start", [told_by_ranks, told_by_job])
def test_two_ranks_have_the_losses_of_one(tmp_path: Path, model_folder, start: Callable) -> None:
    train = write_table(tmp_path / "train.csv", 0, 41, ["0", "1"])  # the last batch of an epoch has one example
    test = write_table(tmp_path / "test.csv", 1, 9, ["0", "1"])
    words = [
        "finetune",
        "--model",
        model_folder("ps"),
        "--train",
        train,
        "--valid",
        test,
        "--test",
        test,
        "--epochs",
        2,
    ]
    words += ["--lr", 0.02, "--batch-size", 8, "--batch-bases", 150, "--out", tmp_path / "two"]
    output = start([sys.executable, *map(str, words)])
    assert output.count("written") == 1
    assert "UserWarning" not in output
    tables = {name: LabelledTable(path) for name, path in (("train", train), ("valid", test), ("test", test))}
    chosen = options(fit={"epochs": 2, "batch_size": 8, "batch_bases": 150})
    one = finetune(Runner(model_folder("ps")), tables, tmp_path / "one", chosen)
    rows = [RunDirectory(tmp_path / name / "runs/full-1").metrics() for name in ("one", "two")]
    assert len(rows[0]) == 14
    for mine, theirs in zip(*rows, strict=True):
        compared = {"loss", "grad_norm", "valid_loss"} & mine.keys()
        assert compared and compared <= theirs.keys()
        for key in compared:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (mine["step"], key)
    assert one["summary"]["full"]["auroc"]["mean"] is not None
