"""A complete checkpoint on disk: its marker, written last, names every file with its size and sha256."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from caduceus.config import Config, config_from_dict
from caduceus.errors import UserError
from caduceus.files import dump_json, sha256_of, sync, write_atomically
from caduceus.patience import is_file, patient, patiently

MARKER = "COMPLETE"
AVERAGE = "average"
"""Name of the averaged weights (`train.ema`) in the optimizer's state of a parameter, as checkpoints hold it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that has its marker."""

    path: Path
    step: int

    def damage(self, contents: bool = True) -> str | None:
        """What is wrong with the files, by their sizes and, with `contents`, by their sha256; None where they are
        whole.

        With `contents`, it waits a moment for a file that is missing: the file was written before the marker, perhaps
        by another node.
        """
        try:
            files = self._files()
        except (OSError, ValueError) as error:
            return f"its marker is not readable ({error})"
        for name, (size, _) in files.items():
            try:
                found_size = patiently((self.path / name).stat, is_there=contents).st_size
            except (FileNotFoundError, NotADirectoryError):
                return f"{name} is missing"
            if found_size != size:
                return f"{name} has {found_size} bytes instead of {size}"
        found = _sha256_of_all(self.path / name for name in files) if contents else []
        for (name, (_, expected)), digest in zip(files.items(), found, strict=contents):
            if digest != expected:
                return f"{name} does not match its sha256"
        return None

    def config(self) -> Config | None:
        """The configuration that it was made with; None where the marker does not hold one that this version
        can read.
        """
        try:
            return config_from_dict(self._marker()["config"])
        except (OSError, ValueError, KeyError, UserError):
            return None

    def _marker(self) -> dict[str, Any]:
        content = json.loads(patiently((self.path / MARKER).read_bytes))
        if not isinstance(content, dict):
            raise ValueError("it holds no facts")
        return content

    def _files(self) -> dict[str, tuple[int, str]]:
        """{name: (bytes, sha256)} of the marker. Raises `ValueError` where the marker lacks these facts for a file."""
        files = self._marker().get("files")
        if not isinstance(files, dict) or not files:
            raise ValueError("it names no files")
        for name, facts in files.items():
            parts = PurePosixPath(name).parts
            if not isinstance(facts, dict) or not facts.keys() >= {"bytes", "sha256"} or {"/", ".."} & set(parts):
                raise ValueError(f"it does not give the size and sha256 of {name}")
        return {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}


@patient
def write_marker(written: Path, step: int, facts: dict[str, Any]) -> None:
    """Mark a fully written directory as the checkpoint of `step`, once all its files are on the disk."""
    found = sorted(path for path in written.rglob("*") if is_file(path))
    if not found:
        raise OSError(f"{written}: holds no files")
    files = {}
    for file, digest in zip(found, _sha256_of_all(found), strict=True):
        sync(file)
        files[str(file.relative_to(written))] = {"bytes": patiently(file.stat).st_size, "sha256": digest}
    write_atomically(written / MARKER, dump_json({"files": files, "step": step, **facts}))


def _sha256_of_all(paths: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=8) as threads:
        return list(threads.map(sha256_of, paths))
