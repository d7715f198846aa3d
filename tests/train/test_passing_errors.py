"""File systems of a network: errors that pass, and files that are seen late, change nothing of a run."""

import builtins
import errno
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caduceus import patience
from caduceus.files import sha256_of, write_atomically
from caduceus.patience import patiently
from caduceus.train import trainer
from tests.train.test_starts import config_of


class Flaky:
    """Opens and reads of files below `folders` that fail at their first time, and every seventh time after it."""

    def __init__(self, patch: pytest.MonkeyPatch, folders: list[Path]) -> None:
        self._folders = [str(folder) for folder in folders]
        self._times: Counter[str] = Counter()
        self.failures: Counter[int] = Counter()
        opened = self._failing(io.open, errno.ESTALE)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "open", self._failing(os.open, errno.ESTALE))
        patch.setattr(os, "preadv", self._failing(os.preadv, errno.EIO))
        patch.setattr(patience, "_PAUSES", (0, 0, 0))

    def _failing(self, call: Callable[..., Any], number: int) -> Callable[..., Any]:
        def flaky(first: Any, *arguments: Any, **options: Any) -> Any:
            mode = str(options.get("mode", arguments[0] if arguments else "r"))
            read = number == errno.EIO or "r" in mode or mode.isdecimal()
            path = first if isinstance(first, int) else os.fspath(first)
            if read and (isinstance(path, int) or any(str(path).startswith(folder) for folder in self._folders)):
                self._times[path] += 1
                if self._times[path] % 7 == 1:
                    self.failures[number] += 1
                    raise OSError(number, os.strerror(number), str(path))
            return call(first, *arguments, **options)

        return flaky


def rows_of(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "samples", "loss", "grad_norm", "valid_loss")
    return [{name: row[name] for name in kept if name in row} for row in rows]


@pytest.mark.slow
def test_a_run_outlives_what_passes(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts of it: the second one resumes from a checkpoint of which every file fails at first."""
    plain, flaky = tmp_path / "plain", tmp_path / "flaky"
    for steps in (2, 4):
        assert trainer.train(config_of(small_shards, plain, steps)) == 0
    assert trainer.train(config_of(small_shards, flaky, 2)) == 0
    with pytest.MonkeyPatch.context() as patch:
        shim = Flaky(patch, [small_shards, flaky / "checkpoints"])
        assert trainer.train(config_of(small_shards, flaky, 4)) == 0
    assert shim.failures[errno.ESTALE] > 5 and shim.failures[errno.EIO] > 1
    assert rows_of(flaky) == rows_of(plain)
    events = [json.loads(line) for line in (flaky / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if "damaged" in str(event) or "substitut" in str(event)]


def failing(times: int, error: OSError) -> Callable[[], str]:
    left = [error] * times

    def attempt() -> str:
        if left:
            raise left.pop()
        return "read"

    return attempt


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of which takes time."""
    made: list[float] = []
    monkeypatch.setattr(patience, "time", SimpleNamespace(sleep=made.append))
    return made


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_what_passes_is_tried_again_with_pauses_that_grow(number: int, pauses: list[float]) -> None:
    error = OSError(number, "")
    assert patiently(failing(4, error)) == "read"
    assert pauses == sorted(pauses) and len(pauses) == 4 and sum(pauses) < 12
    with pytest.raises(OSError) as raised:
        patiently(failing(5, error))
    assert raised.value is error


def test_what_does_not_pass_is_raised_at_once(pauses: list[float]) -> None:
    for error in (PermissionError(errno.EACCES, ""), OSError(errno.ENOSPC, ""), FileNotFoundError(errno.ENOENT, "")):
        with pytest.raises(type(error)):
            patiently(failing(1, error))
    assert not pauses


def test_a_file_that_another_node_has_written_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "late"
    monkeypatch.setattr(patience, "time", SimpleNamespace(sleep=lambda seconds: path.write_bytes(b"here")))
    assert patiently(path.read_bytes, is_there=True) == b"here"


def test_a_file_is_hashed_and_written_whole_though_its_system_fails_midway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    path = tmp_path / "file"
    rename = Path.replace
    fails = [OSError(errno.ESTALE, "")]

    def replace(source: Path, target: Path) -> Path:
        if fails:
            raise fails.pop()
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content" and [p.name for p in tmp_path.iterdir()] == ["file"]
    assert sha256_of(path) == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    assert len(pauses) == 1
