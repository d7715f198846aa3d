"""Blocked gzip (bgzip): checks every block of a file and makes the table of blocks for random access.

Format: SAM specification, section 4.1, https://samtools.github.io/hts-specs/SAMv1.pdf
"""

import struct
from collections.abc import Iterator

import numpy as np
from isal import isal_zlib  # three times as fast as zlib

from caduceus.errors import UserError
from caduceus.gunzip import GZIP_MAGIC, count_foreign_bytes
from data_prep.genome.pinned import SequentialReader

_FIXED_HEADER = struct.Struct("<4BI2BH")
_TRAILER_SIZE = 8
_READ_BLOCKS = 256
"""Most blocks that one `pread` fetches while streaming; a block has at most 64 KiB."""


def is_bgzf(beginning: bytes) -> bool:
    """Whether a gzip file's first bytes (18 or more) are the header of a bgzip block."""
    return _block_size(beginning) is not None


def _block_size(header: bytes) -> int | None:
    """Bytes of the block that begins with `header`; None where that is not the header of a bgzip block."""
    if len(header) < 18 or header[:3] != b"\x1f\x8b\x08" or not header[3] & 4:
        return None
    *_, extra_size = _FIXED_HEADER.unpack_from(header)
    extra = header[12 : 12 + extra_size]
    while len(extra) >= 4:
        identifier, size = extra[:2], int.from_bytes(extra[2:4], "little")
        if identifier == b"BC" and size == 2 and len(extra) >= 6:
            return int.from_bytes(extra[4:6], "little") + 1
        extra = extra[4 + size :]
    return None


class BlockTable:
    """Where each block begins: `compressed` and `decompressed` offsets, (blocks,) int64.

    The last block is the empty one that ends a file. `to_bytes` gives a .gzi index.
    """

    def __init__(self, compressed: np.ndarray, decompressed: np.ndarray) -> None:
        self.compressed, self.decompressed = compressed, decompressed

    def to_bytes(self) -> bytes:
        """The .gzi file: all entries but the first, which is (0, 0)."""
        pairs = np.stack([self.compressed[1:], self.decompressed[1:]], axis=1).astype("<u8")
        return struct.pack("<Q", len(pairs)) + pairs.tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> "BlockTable":
        pairs = np.frombuffer(content, "<u8", offset=8).astype(np.int64).reshape(-1, 2)
        compressed, decompressed = np.concatenate([np.zeros((1, 2), np.int64), pairs]).T
        return cls(compressed, decompressed)


class BlockScanner:
    """Reads a bgzip file from its beginning, checks every block, and collects the block table."""

    def __init__(self, path: object) -> None:
        self.passed_over = 0
        """Bytes after the end marker that are not gzip."""
        self._path = path
        self._compressed, self._decompressed = [0], [0]

    def pieces(self, reader: SequentialReader) -> Iterator[bytes]:
        """The decompressed data, block by block."""
        buffer, at, offset, last_size = b"", 0, 0, -1
        while True:
            if len(buffer) - at < 1 << 16:  # the size of the longest block
                buffer, at = buffer[at:] + reader.read(_READ_BLOCKS << 16), 0
                if not buffer:
                    break
            size = _block_size(buffer[at : at + (1 << 16)])
            if size is None and last_size == 0 and buffer[at : at + 2] != GZIP_MAGIC:
                self.passed_over = count_foreign_bytes(self._path, buffer[at:], reader.read, is_text=True)
                break
            if size is None:
                raise UserError(f"{self._path}: damaged or not bgzip at byte {offset}; download or compress it again")
            if at + size > len(buffer):
                raise UserError(f"{self._path}: truncated in the bgzip block at byte {offset}; download it again")
            data = _inflate(memoryview(buffer)[at : at + size], self._path, offset)
            if offset:
                self._compressed.append(offset)
                self._decompressed.append(self._decompressed[-1] + last_size)
            at, offset, last_size = at + size, offset + size, len(data)
            yield data
        if last_size != 0:
            raise UserError(f"{self._path}: truncated (the end marker of bgzip is missing); download it again")

    def table(self) -> BlockTable:
        return BlockTable(np.array(self._compressed, np.int64), np.array(self._decompressed, np.int64))


def _inflate(block: memoryview, path: object, offset: int) -> bytes:
    """Data of one block. Its crc and size are checked against those in the block; raises `UserError` where
    they differ.
    """
    inflater = isal_zlib.decompressobj(wbits=31)
    try:
        data = inflater.decompress(block)
    except isal_zlib.error as error:
        raise UserError(f"{path}: damaged bgzip block at byte {offset} ({error}); download it again") from None
    if not inflater.eof:
        raise UserError(f"{path}: damaged bgzip block at byte {offset}; download it again")
    return data
