"""Makes the index of a tar from the tar alone: walks the members, checks their form, and measures the bases."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from caduceus.data.format import INDEX_DTYPE, STRAND_SYMBOLS, ShardIndex
from caduceus.errors import UserError
from data_prep.plan.composition import composition
from data_prep.tar_format import BLOCK, END, member_header
from data_prep.write.index_rows import listed_runs, run_table

STORED_DTYPE = np.dtype([("contig", "<u4"), ("start", "<u8"), ("end", "<u8"), ("strand", "u1")])
NO_WINDOWS = np.empty(0, dtype=STORED_DTYPE)


@dataclass(frozen=True)
class TarContent:
    """The content of a shard's tar: its index, and the key and description of each sample."""

    index: ShardIndex
    windows: np.ndarray  # STORED_DTYPE
    keys: list[str]
    descriptions: list[dict[str, Any]]


def read_tar(path: Path, contig_rows: Mapping[str, int]) -> TarContent:
    """Read a whole tar. Raises `UserError`, which names the byte, for anything but samples of this format."""
    keys, descriptions, windows, samples, runs = [], [], [], [], []
    with path.open("rb") as file:
        while (member := _read_member(file, path)) is not None:
            offset = file.tell() - _padded(len(member[1]))
            name, bases = member
            text_name, text = _read_member(file, path) or ("the end", b"")
            key = name.removesuffix(".seq")
            if name != f"{key}.seq" or text_name != f"{key}.json":
                raise UserError(f"{path}: at byte {offset}: {name} and {text_name} are not KEY.seq and KEY.json")
            try:
                description = json.loads(text)
                contig = contig_rows[description["contig"]]
                start, end, pad = int(description["start"]), int(description["end"]), int(description.get("pad", 0))
                strand = STRAND_SYMBOLS.index(description["strand"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: {key}.json: not the description of a sample ({error!r})") from None
            if end - start + pad != len(bases):
                raise UserError(
                    f"{path}: {key}: has {len(bases):,} bases, but its description says {end - start + pad:,}"
                )
            counts = composition(np.frombuffer(bases, np.uint8))
            if counts.acgt < counts.bases:
                runs.append(run_table(len(keys), listed_runs(bases)))
            row = (offset, len(bases), contig, start, strand, counts.acgt, counts.lower, zlib.crc32(bases))
            samples.append(row)
            windows.append((contig, start, end, strand))
            keys.append(key)
            descriptions.append(description)
    index = ShardIndex(np.array(samples, dtype=INDEX_DTYPE), np.concatenate([run_table(0, listed_runs(b"")), *runs]))
    return TarContent(index, np.array(windows, dtype=STORED_DTYPE), keys, descriptions)


def _read_member(file: BinaryIO, path: Path) -> tuple[str, bytes] | None:
    """Name and content of the next member; None at the end of the tar."""
    position = file.tell()
    header = file.read(BLOCK)
    if header == END[:BLOCK]:
        if file.read() != END[BLOCK:]:
            raise UserError(f"{path}: at byte {position}: the end of the tar is damaged")
        return None
    try:
        name = header[:100].rstrip(b"\0").decode("ascii")
        content_size = int(header[124:135], 8)
        sound = member_header(name, content_size) == header
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"{path}: at byte {position}: there is no member header of a shard")
    content = file.read(_padded(content_size))
    if len(content) < _padded(content_size):
        raise UserError(f"{path}: the file ends within {name}")
    return name, content[:content_size]


def _padded(content_size: int) -> int:
    return content_size + -content_size % BLOCK
