"""Files compressed by gzip, bzip2 or xz, decompressed while they are read from their beginning. Imports no torch."""

import bz2
import lzma
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from caduceus.gunzip import GZIP_MAGIC, DamagedGzipError, Gunzip

_MOST = 1 << 12
"""Bytes in a piece. DecompressedPieces are small because one with damage in it is lost from its beginning."""
_CHUNK = 1 << 15
"""Compressed bytes that are read at a time; isal copies the unused ones at each piece."""


class DecompressionError(Exception):
    """A compressed file is cut short, or its content does not match its checksum. The message names no file."""


class DecompressedPieces(Protocol):
    """The data of a compressed file, to iterate over once. `passed_over` counts the bytes after it that do not belong
    to it.
    """

    passed_over: int

    def __iter__(self) -> Iterator[bytes]: ...


class Decompressed:
    """A compressed file's data, as a file to read."""

    def __init__(self, pieces: DecompressedPieces) -> None:
        self._pieces, self._left = iter(pieces), memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most `size` of the next bytes; none at the end. Raises `DecompressionError`, and what the file raises."""
        try:
            self._left = self._left or memoryview(next(self._pieces, b""))
        except DamagedGzipError as error:
            raise DecompressionError(error.problem) from None
        piece, self._left = self._left[:size], self._left[size:]
        return bytes(piece)


def decompressed_pieces(start: bytes, file: BinaryIO) -> DecompressedPieces | None:
    """The decompressed data of a file that begins with `start`; None where no known compression begins so."""
    if start.startswith(GZIP_MAGIC):
        return Gunzip("", lambda _: file.read(_CHUNK), _MOST)
    for magic, decompressor in _STREAMS.items():
        if start.startswith(magic):
            return _Streams(magic, decompressor, file)
    return None


_STREAMS: dict[bytes, Callable[[], Any]] = {b"BZh": bz2.BZ2Decompressor, b"\xfd7zXZ\x00": lzma.LZMADecompressor}
OTHER_PROGRAMS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
"""First bytes of a file -> the program that made it, for compressions that are not read here."""
LONGEST_MAGIC = max(map(len, _STREAMS))


class _Streams:
    """The data of bzip2 or xz streams, one after the other, perhaps with zeros in between. Checksums are checked.

    Works like the standard library's files, but counts the bytes after the last stream.
    """

    def __init__(self, magic: bytes, decompressor: Callable[[], Any], file: BinaryIO) -> None:
        self.passed_over = 0
        self._magic, self._decompressor, self._file = magic, decompressor, file

    def __iter__(self) -> Iterator[bytes]:
        rest = self._file.read(_CHUNK)
        while rest.startswith(self._magic):
            stream = self._decompressor()
            while not stream.eof:
                if stream.needs_input and not (rest := rest or self._file.read(_CHUNK)):
                    raise DecompressionError("truncated in its compressed data")
                try:
                    piece = stream.decompress(rest, _MOST)
                except (OSError, lzma.LZMAError) as error:
                    raise DecompressionError(str(error)) from None
                rest = b""
                if piece:
                    yield piece
            self.passed_over, rest = self._without_zeros(stream.unused_data)
        while rest:
            self.passed_over += len(rest)
            rest = self._file.read(_CHUNK)

    def _without_zeros(self, rest: bytes) -> tuple[int, bytes]:
        """How many zeros `rest` and the file begin with, and the bytes after them, enough to tell what they are."""
        zeros = 0
        while True:
            trimmed = rest.lstrip(b"\0")
            zeros += len(rest) - len(trimmed)
            more = b"" if len(trimmed) >= len(self._magic) else self._file.read(_CHUNK)
            if not more:
                return zeros, trimmed
            rest = trimmed + more
