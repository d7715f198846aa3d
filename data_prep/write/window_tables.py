"""Makes the tables of a dataset: for each split, the windows and the runs of all species, in two files to map into
memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.data.format import SPLITS, ShardIndex, index_path
from caduceus.data.windows import WINDOW_DTYPE, WINDOW_RUN_DTYPE, require_fit, windows_of
from caduceus.files import replacing, sha256_of
from caduceus.patience import is_file, listed, patiently

_KINDS = ("windows", "runs")
_ROWS = 1 << 16


def window_tables(directory: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the tables' files, and return the manifest's part on them, {split: {windows, runs, counts}}.

    The files' names contain the fingerprint of the shards, so that the tables of the old manifest stay until it is
    replaced.
    """
    return {
        split: _table(directory, manifest, split)
        for split in SPLITS
        if any(split in part["splits"] for part in manifest["species"])
    }


def known_tables(directory: Path, before: dict[str, Any], fingerprint: str) -> dict[str, Any] | None:
    """The tables of an earlier manifest, if it has the same fingerprint of shards and all files are whole;
    else None.
    """
    tables = before.get("tables")
    if before.get("fingerprint") != fingerprint or not tables:
        return None
    files = [table[kind] for table in tables.values() for kind in _KINDS]
    paths = [(directory / file["name"], file["bytes"]) for file in files]
    return tables if all(is_file(path) and patiently(path.stat).st_size == size for path, size in paths) else None


def remove_other_tables(directory: Path, tables: dict[str, Any]) -> None:
    """Remove the tables of earlier manifests."""
    names = {table[kind]["name"] for table in tables.values() for kind in _KINDS}
    for kind in _KINDS:
        for path in listed(directory, f"*.{kind}.npy"):
            if path.name not in names:
                path.unlink()


def table_problems(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """The tables that differ from the manifest, or from the indexes of the shards."""
    for split, table in manifest.get("tables", {}).items():
        paths = [directory / table[kind]["name"] for kind in _KINDS]
        bad = [path for path, kind in zip(paths, _KINDS, strict=True) if not _is_whole(path, table[kind])]
        yield from (f"{path}: is missing or changed (sha256); --rebuild-index makes it again" for path in bad)
        if not bad:
            for path, rows in zip(paths, _rows(directory, manifest, split)[:2], strict=True):
                if not np.array_equal(np.load(path), rows):
                    yield f"{path}: differs from the indexes of the shards; --rebuild-index makes it again"


def _is_whole(path: Path, file: dict[str, Any]) -> bool:
    return is_file(path) and sha256_of(path) == file["sha256"]


def _table(directory: Path, manifest: dict[str, Any], split: str) -> dict[str, Any]:
    *arrays, counts = _rows(directory, manifest, split)
    files = {}
    for kind, rows in zip(_KINDS, arrays, strict=True):
        path = directory / f"{split}-{manifest['fingerprint'][:12]}.{kind}.npy"
        files[kind] = _write(path, rows)
    return {**files, "counts": counts}


def _rows(directory: Path, manifest: dict[str, Any], split: str) -> tuple[np.ndarray, np.ndarray, dict[str, list[int]]]:
    """Windows and runs of all species, with shards and windows numbered over all species, and their numbers per
    species.
    """
    windows, runs = [np.zeros(0, WINDOW_DTYPE)], [np.zeros(0, WINDOW_RUN_DTYPE)]
    counts: dict[str, list[int]] = {"windows": [], "runs": [], "bases": []}
    shards, before = 0, 0
    for part in manifest["species"]:
        if split not in part["splits"]:
            continue
        entries = part["splits"][split]["shards"]
        padded = part["plan"].get("tail") == "pad"
        found, of_found = windows_of(_indexes(directory / part["name"], part, entries), padded)
        found["shard"] += shards
        of_found["window"] += before
        windows.append(found)
        runs.append(of_found)
        for name, count in (
            ("windows", len(found)),
            ("runs", len(of_found)),
            ("bases", found["length"].sum(dtype=int)),
        ):
            counts[name].append(int(count))
        shards, before = shards + len(entries), before + len(found)
    return np.concatenate(windows), np.concatenate(runs), counts


def _indexes(folder: Path, part: dict[str, Any], entries: list[dict[str, Any]]) -> Iterator[ShardIndex]:
    for entry in entries:
        path = index_path(folder / entry["name"])
        index = ShardIndex.load(path)
        require_fit(index, path, entry, len(part["contigs"]))
        yield index


def _write(path: Path, rows: np.ndarray) -> dict[str, Any]:
    """Write rows as .npy, and return the file's name, size and sha256."""
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(rows))
        for first in range(0, len(rows), _ROWS):
            file.write(rows[first : first + _ROWS].tobytes())
    return {"name": path.name, "bytes": patiently(path.stat).st_size, "sha256": sha256_of(path)}
