"""Datasets of different species -> one, by hard links where the file system allows, else by copies."""

import os
import shutil
from pathlib import Path
from typing import Any

from caduceus.data.shards import index_path, load_manifest
from caduceus.errors import UserError
from data_prep.dataset import check_species, locked, read_part, write_manifest


def merge(sources: list[Path], out: Path) -> dict[str, Any]:
    """Bring the species of complete datasets together in `out`; returns its manifest.

    Equals making them in one run. Species that `out` holds already stay; one that is there in another form is refused.
    """
    origins: dict[str, Path] = {}
    for source in sources:
        for part in load_manifest(source)["species"]:
            folder = source / part["name"]
            other = origins.setdefault(part["name"], folder)
            _require_equal(part, other)
    check_species(out, list(origins), add=True)
    for name in origins:
        if (out / name / "species.json").exists():
            _require_equal(read_part(origins[name] / "species.json"), out / name)
    with locked(out):
        for name, folder in origins.items():
            if not (out / name / "species.json").exists():
                _bring(folder, out / name)
        return write_manifest(out)


def _require_equal(part: dict[str, Any], folder: Path) -> None:
    if read_part(folder / "species.json") != part:
        raise UserError(f"species {part['name']}: {folder} holds another version of it; merge one of them")


def _bring(source: Path, target: Path) -> None:
    part = read_part(source / "species.json")
    names = [shard["name"] for split in part["splits"].values() for shard in split["shards"]]
    staging = target.with_name(f".{target.name}.tmp")
    try:
        staging.mkdir()
        for name in names:
            for path in (source / name, index_path(source / name)):
                _link_or_copy(path, staging / path.name)
        _link_or_copy(source / "species.json", staging / "species.json")
        if target.exists():  # begun there by a run that was killed: nothing of it is needed
            shutil.rmtree(target)
        staging.rename(target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"{target}: cannot be written ({error.strerror}); run the same command again") from None


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise UserError(f"{source}: is missing; the dataset is damaged, see --verify") from None
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())
