"""Decompresses gzip files as common tools write them: with any number of members, and bytes after the last one."""

import re
from collections.abc import Callable, Iterator

from isal import isal_zlib  # three times as fast as zlib

from caduceus.errors import UserError
from caduceus.files import CHUNK

GZIP_MAGIC = b"\x1f\x8b"
_DEFLATE_MAGIC = b"\x1f\x8b\x08"
_MEMBER = re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL)
_MEMBER_BYTES = 10
_OF_TEXT = bytes(range(32, 127)) + b"\t\n\r"


class DamagedGzipError(UserError):
    """A gzip file is cut short or damaged; `problem` says which, without the path."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}; download it again")
        self.problem = problem


class Gunzip:
    """The data of a gzip file, in pieces of at most `most` bytes; every checksum is checked.

    `read(n)` returns at most the next n bytes of the file, and none at its end. `passed_over` counts the bytes after
    the last member that are not gzip (padding, or another tool's index); it is known when the iteration ends. Raises
    `DamagedGzipError`, which names `path`, for damage. Bytes after a member that look like a further, damaged one are
    damage. So are lines of text where the data `is_text`, as `cat a.gz b.txt` makes them. The piece in which damage is
    found is not yielded.
    """

    def __init__(
        self, path: object, read: Callable[[int], bytes], most: int | None = None, is_text: bool = False
    ) -> None:
        self.passed_over = 0
        self._path, self._read, self._most, self._is_text = path, read, most or CHUNK, is_text

    def __iter__(self) -> Iterator[bytes]:
        rest = self._read(CHUNK)
        while True:
            member = isal_zlib.decompressobj(wbits=31)
            while not member.eof:
                rest = rest or self._read(CHUNK)
                if not rest:
                    raise DamagedGzipError(self._path, "truncated gzip")
                try:
                    piece = member.decompress(rest, self._most)
                except isal_zlib.error as error:
                    raise DamagedGzipError(self._path, f"damaged gzip ({error})") from None
                rest = member.unconsumed_tail
                if piece:
                    yield piece
            rest = member.unused_data or self._read(CHUNK)
            if len(rest) < _MEMBER_BYTES:
                rest += self._read(CHUNK)
            if not rest.startswith(GZIP_MAGIC):
                self.passed_over = count_foreign_bytes(self._path, rest, self._read, self._is_text)
                return


def count_foreign_bytes(path: object, rest: bytes, read: Callable[[int], bytes], is_text: bool) -> int:
    """How many bytes follow a gzip stream: those of `rest`, and those that `read` returns.

    Raises `DamagedGzipError` where they hold a further member, or begin nearly as a member does: the file is then
    damaged. Raises `UserError` where the data (`is_text`) and these bytes are both text.
    """
    if is_text and b"\n" in rest.lstrip() and not rest.translate(None, _OF_TEXT):
        raise UserError(f"{path}: plain text follows the gzip data; compress that as well, or cut it off")
    alike = sum(found == expected for found, expected in zip(rest, _DEFLATE_MAGIC, strict=False))
    count, before = 0, b""
    while rest:
        if alike >= 2 or _MEMBER.search(before + rest):
            raise DamagedGzipError(path, "damaged gzip, at the beginning of a member")
        count += len(rest)
        before, rest = rest[1 - _MEMBER_BYTES :], read(CHUNK)
    return count
