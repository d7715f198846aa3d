"""Reads the steps in the `.wandb` files that W&B's client writes offline, and removes undone steps.

Such a file is a log in LevelDB's format (records cut into blocks of 32 KiB) of the client's protobuf messages.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

from caduceus.files import replacing
from caduceus.patience import listed

_BLOCK = 32768
_HEADER = struct.Struct("<4sHB")
_MAGIC = (b":W&B", 0xBEE1, 0)
_CHUNK = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def run_files(directory: Path, run_id: str) -> list[Path]:
    """The offline files of a run, oldest first."""
    return listed(directory, f"offline-run-*-{run_id}/run-{run_id}.wandb")


def last_step(directory: Path, run_id: str) -> int:
    """The newest step in a run's offline files; 0 where there is none.

    It is in the newest file with any step, as each start goes on where the starts before it ended.
    """
    newest = (max(map(step_of, read_records(path)), default=0) for path in reversed(run_files(directory, run_id)))
    return next(filter(None, newest), 0)


def drop_steps_after(directory: Path, run_id: str, step: int) -> None:
    """Remove the history after `step` from a run's offline files; everything else in them stays."""
    for path in reversed(run_files(directory, run_id)):
        records = list(read_records(path))
        kept = [record for record in records if step_of(record) <= step]
        if len(kept) < len(records):
            write_records(path, kept)
        if any(map(step_of, kept)):
            return  # earlier files hold earlier steps


def step_of(record: Record) -> int:
    """The step of a history record; 0 for other records."""
    if record.WhichOneof("record_type") != "history":
        return 0
    for item in record.history.item:
        if item.key == "_step" or list(item.nested_key) == ["_step"]:
            return int(item.value_json)
    return record.history.step.num


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a `.wandb` file, up to its end or to the place where a kill cut it."""
    content = path.read_bytes()
    if len(content) < _HEADER.size or _HEADER.unpack_from(content) != _MAGIC:
        return
    place, gathered = _HEADER.size, b""
    while place + _CHUNK.size <= len(content):
        room = _BLOCK - place % _BLOCK
        if room < _CHUNK.size:
            place += room
            continue
        checksum, length, kind = _CHUNK.unpack_from(content, place)
        data = content[place + _CHUNK.size : place + _CHUNK.size + length]
        if len(data) < length or zlib.crc32(bytes([kind]) + data) != checksum:
            return
        place += _CHUNK.size + length
        gathered = data if kind in (_FULL, _FIRST) else gathered + data
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(gathered)
            yield record


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace a `.wandb` file with one that has these records."""
    with replacing(path) as file:
        file.write(_HEADER.pack(*_MAGIC))
        place = _HEADER.size
        for record in records:
            data, first = record.SerializeToString(), True
            while first or data:
                room = _BLOCK - place % _BLOCK
                if room < _CHUNK.size:
                    file.write(bytes(room))
                    place += room
                    continue
                piece, data = data[: room - _CHUNK.size], data[room - _CHUNK.size :]
                kind = (_FIRST if data else _FULL) if first else (_MIDDLE if data else _LAST)
                file.write(_CHUNK.pack(zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece)
                place += _CHUNK.size + len(piece)
                first = False
