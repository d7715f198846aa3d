"""What a start reads, rank by rank: opens are counted by an audit hook."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from caduceus.config import Config, config_from_dict
from caduceus.train import trainer
from tests.conftest import REPOSITORY
from tests.distributed.ranks import on_ranks

_counted: Counter[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _counted is not None and isinstance(arguments[0], str | bytes | os.PathLike):
        _counted[os.fsdecode(arguments[0])] += 1


sys.addaudithook(_hook)


@contextmanager
def counted_opens() -> Iterator[Counter[str]]:
    """Within, the opens of this process by path, those of libraries written in C left out."""
    global _counted
    _counted = found = Counter()
    try:
        yield found
    finally:
        _counted = None


def config_of(shards: Path, directory: Path, steps: int, **keys: Any) -> Config:
    return config_from_dict(
        {
            "model": {"d_model": 8, "n_layer": 1, "d_state": 4},
            "data": {"path": str(shards), "seq_len": 64, "workers": 0},
            "train": {"steps": steps, "global_batch": 4, "micro_batch": 1, "warmup_steps": 1},
            "valid": {"every": 1, "samples": 4},
            "checkpoint": {"every": 1},
            "run": {"dir": str(directory), "name": "starts", "device": "cpu", "allow_change": ["train.steps"]},
            "wandb": {"mode": "disabled"},
            "monitor": {"report": False, "windows": 0},
            **keys,
        }
    )


def opens_of_a_resume(rank: int, shards: Path, directory: Path) -> dict[str, int]:
    """A rank's opens of shards' and checkpoints' files, by name, from the start of a second job to its last step."""
    assert trainer.train(config_of(shards, directory, steps=1)) == 0
    before = directory / "checkpoints" / "step-00000001"
    with counted_opens() as found:
        assert trainer.train(config_of(shards, directory, steps=2)) == 0
    of_interest = Counter()
    for path, times in found.items():
        if Path(path).parent in (shards, before):
            of_interest[Path(path).name] += times
    return dict(of_interest)


@pytest.mark.slow
def test_one_rank_reads_the_manifest_and_checks_the_checkpoint(small_shards: Path, tmp_path: Path) -> None:
    """The others get the manifest from it, and open of a checkpoint what they load."""
    main, other = on_ranks(2, opens_of_a_resume, small_shards, tmp_path / "run")
    assert main["manifest.json"] == 1 and "manifest.json" not in other
    assert main["COMPLETE"] >= 1 and "COMPLETE" not in other
    weights = [name for name in main if name.endswith(".distcp")]
    assert weights and all(main[name] == other[name] + 1 for name in weights), "one more, to hash it"
    assert main["rng.pt"] == 2 and other["rng.pt"] == 1
    assert len([name for name in other if name.endswith(".npy")]) == 4, "windows and runs of two splits"


OPTIONAL = ("deepspeed", "transformers", "sklearn", "pandas", "pyarrow", "pysam", "s3fs", "wandb_workspaces")
"""Packages of which a training makes no use unless it is told to."""
ELSEWHERE = ("matplotlib", "pyfaidx", "wandb", "data_prep", "caduceus.evaluate.in_loop", "caduceus.doctor")
"""What only reports, evaluations and W&B need."""


@pytest.mark.moderate
def test_a_training_imports_nothing_that_it_may_do_without() -> None:
    code = "import sys, json, caduceus.train.__main__, caduceus.train.trainer; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert not {*OPTIONAL, *ELSEWHERE} & set(json.loads(done.stdout))
