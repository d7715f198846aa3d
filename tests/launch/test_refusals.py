"""What would go wrong with a run's data is said before its job waits in a queue."""

import tarfile
from pathlib import Path

import pytest

from caduceus.config import config_from_dict
from launch.refusals import _data_complaint
from tests.data.shard_fixture import Species, tile, write_dataset


def complaint(valid_every: int = 1, **data: object) -> str | None:
    return _data_complaint(config_from_dict({"data": {"seq_len": 64, **data}, "valid": {"every": valid_every}}))


def test_a_stream_is_taken_and_its_commands_are_not(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    assert complaint(mode="stream", path=str(tmp_path / "a.tar")) is None
    assert "runs a command" in complaint(mode="stream", path="pipe:cat a.tar")
    assert "data.path: in stream mode" in complaint(mode="stream", path=3)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_both_splits_are_looked_at(tmp_path: Path, split: str) -> None:
    windows = {"train": [], "valid": [], split: tile("c", 256, 128)}
    path = str(write_dataset(tmp_path, [Species("one", {"c": "ACGT" * 64}, windows)]))
    missing = {"train": "valid", "valid": "train"}[split]
    assert f"has windows in the split '{missing}'" in complaint(path=path)
    assert (complaint(valid_every=0, path=path) is None) == (split == "train")
