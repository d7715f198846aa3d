"""Writes files of embeddings as these come: .npz for numpy, .parquet for other tools, .zarr for tracks of bases.

.npz: `names` (n,) and `embeddings` (n, D); per base also `offsets` (n + 1,): sequence i has rows offsets[i] to
offsets[i + 1] of `embeddings` (bases, D). .parquet: columns `name` and `embedding`; per base also `position` from 0.
.zarr: a group with the arrays of .npz, from which readers fetch chunks; `names` is an attribute. Imports no torch.
"""

import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.columns import PARQUET, package
from caduceus.files import replacing, replacing_directory

_ZARR = ".zarr"
_CHUNK = 16_384
"""Rows of a chunk of .zarr."""


def check_embeddings_name(out: str | Path) -> None:
    suffix = Path(out).suffix.lower()
    if suffix not in (".npz", _ZARR, *PARQUET):
        raise UserError(f"--out: {out} should end in .npz, .parquet or .zarr, which says its format")
    if suffix != ".npz":
        package("zarr" if suffix == _ZARR else "pyarrow")


def write_embeddings(
    out: str | Path, names: list[str], lengths: list[int] | None, vectors: Iterable[np.ndarray]
) -> None:
    """Write `vectors`, an iterable of (…, D): one per sequence, or with `lengths` those of all bases of each
    sequence.
    """
    if Path(out).suffix.lower() == ".npz":
        _write_npz(Path(out), names, lengths, iter(vectors))
    elif Path(out).suffix.lower() == _ZARR:
        _write_zarr(Path(out), names, lengths, iter(vectors))
    else:
        _write_parquet(Path(out), names, lengths, vectors)


def _write_npz(out: Path, names: list[str], lengths: list[int] | None, vectors: Iterator[np.ndarray]) -> None:
    first = next(vectors)
    rows = len(names) if lengths is None else sum(lengths)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    with replacing(out) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("embeddings.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_2_0(entry, {**header, "shape": (rows, first.shape[1])})
            entry.write(first.tobytes())
            for part in vectors:
                entry.write(part.tobytes())
        arrays = {"names": np.array(names)}
        if lengths is not None:
            arrays["offsets"] = np.cumsum([0, *lengths])
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array)


def _write_zarr(out: Path, names: list[str], lengths: list[int] | None, vectors: Iterator[np.ndarray]) -> None:
    zarr, first = package("zarr"), next(vectors)
    rows = len(names) if lengths is None else sum(lengths)
    shape, chunks = (rows, first.shape[1]), (min(rows, _CHUNK), first.shape[1])
    with replacing_directory(out) as new:
        zarr.open_group(str(new), mode="w").attrs["names"] = names
        made = zarr.open_array(str(new / "embeddings"), mode="w", shape=shape, chunks=chunks, dtype=first.dtype)
        row = 0
        for part in chain([first], vectors):
            made[row : row + len(part)] = part
            row += len(part)
        if lengths is not None:
            offsets = np.cumsum([0, *lengths])
            options = {"shape": offsets.shape, "chunks": offsets.shape, "dtype": offsets.dtype}
            zarr.open_array(str(new / "offsets"), mode="w", **options)[:] = offsets


def _write_parquet(out: Path, names: list[str], lengths: list[int] | None, vectors: Iterable[np.ndarray]) -> None:
    arrow, parquet = package("pyarrow"), package("pyarrow.parquet")
    counts = [1] * len(names) if lengths is None else lengths
    ends, row = np.cumsum(counts), 0
    with replacing(out) as file:
        writer = None
        for part in vectors:
            rows = np.arange(row, row + len(part))
            row += len(part)
            owners = np.searchsorted(ends, rows, side="right")
            flat = arrow.array(np.ascontiguousarray(part).reshape(-1))
            columns = {"name": arrow.array([names[owner] for owner in owners])}
            if lengths is not None:
                columns["position"] = arrow.array(rows - (ends - counts)[owners])
            columns["embedding"] = arrow.FixedSizeListArray.from_arrays(flat, part.shape[1])
            table = arrow.table(columns)
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
        writer.close()
