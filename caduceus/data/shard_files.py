"""Positional reads from the tars of a dataset, local or cached. Imports no torch."""

import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from caduceus.data.cache import Shard, ShardCache
from caduceus.patience import exists, patiently, status

MAX_OPEN_FILES = 128
"""File descriptors that a process keeps open: hundreds of species have more shards than a process may open."""
MAX_OPEN_CACHED = 4
"""The same for cached shards: an evicted one takes disk space until the last process closes it."""


class ShardFiles:
    """Positional reads from shards with a bounded number of open files. Safe to pickle and to fork."""

    def __init__(self, shards: Sequence[Shard], cache: ShardCache | None = None) -> None:
        self.shards = shards
        self._cache = cache
        self._most = MAX_OPEN_CACHED if cache else MAX_OPEN_FILES
        self._open: OrderedDict[int, int] = OrderedDict()
        self._ends: dict[tuple[int, int], int] = {}

    def read_into(self, file: int, offset: int, buffer: np.ndarray) -> None:
        """Fill `buffer` (n,) uint8 from byte `offset` of file number `file`. Raises `OSError`, also where the file ends
        early.
        """
        patiently(lambda: self._read_into(file, offset, buffer))

    def _read_into(self, file: int, offset: int, buffer: np.ndarray) -> None:
        try:
            self._fill(file, offset, buffer)
        except OSError:  # the next attempt may have to open the file anew
            if file in self._open:
                os.close(self._open.pop(file))
            raise

    def _fill(self, file: int, offset: int, buffer: np.ndarray) -> None:
        descriptor = self._descriptor(file)
        view = memoryview(buffer)
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise OSError(f"{self.shards[file].path}: ends before byte {offset + len(view)}")
            view, offset = view[count:], offset + count

    def is_checked(self, file: int) -> bool:
        """Whether a cache has checked the sha256 of the whole file since the start. Raises `OSError`."""
        if self._cache is None:
            return False
        self._descriptor(file)
        # Asked first: the copy that it speaks of may have taken the place of the one that is open here.
        return self._cache.has_checked(self.shards[file]) and self._is_in_place(file)

    def genome_end(self, window: np.void) -> int:
        """Where the genome's bases of a window (WINDOW_DTYPE) end in the contig. Raises `OSError`.

        Only KEY.json, which follows the bases, tells this. In the index, padding looks like N of the genome, and less
        than 16 bases of it are not listed. A segment may end at any gap or excluded interval, so neither the contig's
        length nor the neighbouring windows tell it.
        """
        start, length = int(window["start"]), int(window["length"])
        if not window["may_be_padded"]:
            return start + length
        file, offset = int(window["shard"]), int(window["offset"])
        if (file, offset) not in self._ends:
            header = np.empty(tarfile.BLOCKSIZE, np.uint8)
            at = offset + length + -length % tarfile.BLOCKSIZE
            self.read_into(file, at, header)
            try:
                member = tarfile.TarInfo.frombuf(header.tobytes(), "utf-8", "strict")
                text = np.empty(member.size, np.uint8)
                self.read_into(file, at + tarfile.BLOCKSIZE, text)
                described = json.loads(text.tobytes())
                if described["end"] - start + described.get("pad", 0) != length:
                    raise ValueError("other bases than the index")
            except (tarfile.HeaderError, ValueError, KeyError, TypeError) as error:
                raise OSError(f"{self.shards[file].path}: byte {at}: no description of a sample ({error!r})") from None
            self._ends[file, offset] = described["end"]
        return self._ends[file, offset]

    def forget(self, file: int) -> None:
        """Close a file; a cached one is fetched again when it is next read, unless another process has done this."""
        is_newest = file not in self._open or self._is_in_place(file)
        if file in self._open:
            os.close(self._open.pop(file))
        if self._cache and is_newest:
            self.shards[file].path.unlink(missing_ok=True)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _is_in_place(self, file: int) -> bool:
        """Whether the open file is the one that has the shard's name now."""
        named = status(self.shards[file].path)
        return named is not None and os.path.samestat(os.fstat(self._open[file]), named)

    def _was_fetched_again(self, file: int) -> bool:
        """Whether another process has replaced the open copy, as it found damage. An evicted copy is as good as any."""
        return bool(self._cache) and not os.fstat(self._open[file]).st_nlink and exists(self.shards[file].path)

    def _descriptor(self, file: int) -> int:
        if file in self._open and self._was_fetched_again(file):
            os.close(self._open.pop(file))
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= self._most:
            os.close(self._open.popitem(last=False)[1])
        shard = self.shards[file]
        self._open[file] = self._cache.open(shard) if self._cache else os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[file]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()
