"""Merges datasets of different species into one, by hard links where the file system has them, else by copies."""

import os
import shutil
from pathlib import Path
from typing import Any

from caduceus.data.format import index_path, load_manifest
from caduceus.errors import UserError
from caduceus.files import replacing_directory, sync, temporary_name
from caduceus.patience import exists, patient
from data_prep.write.directory import (
    LOCK,
    SpeciesDirectory,
    check_species,
    damaged_shards,
    locked,
    part_identity,
    parts_of,
    read_part,
    refuse_unseen_copies,
    shard_rows,
    write_manifest,
)


@patient
def merge(sources: list[Path], out: Path, add: bool = False) -> dict[str, Any]:
    """Merge the species of complete datasets into `out`, and return its manifest.

    The result equals a dataset that was made in one run. With `add`, other species that `out` already holds stay.
    Raises `UserError` for a species that `out` holds in another version.
    """
    origins: dict[str, Path] = {}
    datasets = [load_manifest(source)["species"] for source in sources]
    for source, parts in zip(sources, datasets, strict=True):
        for part in parts:
            folder = source / part["name"]
            other = origins.setdefault(part["name"], folder)
            _require_equal(part, other)
            _require_whole(part, folder)
    check_species(out, list(origins), add)
    beside = [part for part in parts_of(out) if part["name"] not in origins]
    for parts in (*datasets, beside):
        refuse_unseen_copies(parts, [*origins, *(part["name"] for part in beside)])
    for name in origins:
        if exists(out / name / "species.json"):
            _require_equal(read_part(origins[name] / "species.json"), out / name)
    with locked(out):
        for name, folder in origins.items():
            part_path = out / name / "species.json"
            if not exists(part_path) or damaged_shards(out / name, read_part(part_path)):
                _bring(folder, out / name)
        return write_manifest(out)


@patient
def take_in(folder: Path, out: Path, names: list[str]) -> None:
    """Move finished species from `folder`, on the same file system, into `out`, whose manifest is not written.

    A species that `out` already holds whole stays. Raises `UserError` where it is of another genome or other options.
    """
    check_species(out, names, add=True)
    replaced = []
    with locked(out):
        for name in names:
            source, target = folder / name, out / name
            if not exists(source / "species.json"):  # an earlier run moved it
                continue
            if SpeciesDirectory(out, part_identity(read_part(source / "species.json"))).finished():
                shutil.rmtree(source)
                continue
            (source / LOCK).unlink(missing_ok=True)
            if exists(target):
                replaced.append(target.rename(temporary_name(target)))
            source.rename(target)
        sync(out)
        for path in replaced:
            shutil.rmtree(path)


def _require_equal(part: dict[str, Any], folder: Path) -> None:
    if read_part(folder / "species.json") != part:
        raise UserError(f"species {part['name']}: {folder} holds another version of it; merge one of them")


def _require_whole(part: dict[str, Any], folder: Path) -> None:
    damaged = damaged_shards(folder, part)
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise UserError(
            f"{folder / damaged[0]}{more}: the tar or its index is missing or damaged; run the command that made the "
            "dataset again, which restores it, then merge"
        )


def _bring(source: Path, target: Path) -> None:
    part = read_part(source / "species.json")
    names = [row["name"] for row in shard_rows(part)]
    try:
        with replacing_directory(target) as staging:  # what a killed run began there is not needed
            for name in names:
                for path in (source / name, index_path(source / name)):
                    _link_or_copy(path, staging / path.name)
            _link_or_copy(source / "species.json", staging / "species.json")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); run the same command again") from None


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise UserError(f"{source}: is missing; the dataset is damaged, see --verify") from None
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
