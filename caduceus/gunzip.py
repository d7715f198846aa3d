"""Decompresses gzip files as people's tools write them: with any number of members, and bytes behind the last one."""

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
    """A gzip file is cut short, or its content is not what it was; `problem` says which, without its path."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}; download it again")
        self.problem = problem


class Gunzip:
    """The data of a gzip file, piece by piece; every checksum is checked.

    `read` gives at most so many of the file's next bytes, none at its end. `passed_over` counts the bytes behind the
    last member, which are no gzip (padding, or the index of another tool); it is known when the iteration ends. Damage
    is a `DamagedGzipError` that names `path`. Bytes behind a member that look like a further one, damaged, are damage
    too, and so are lines of text where the data `is_text`, as `cat a.gz b.txt` makes them. A piece has `most` bytes or
    fewer; that in which damage is met is not given.
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
    """How many bytes stand behind a gzip stream, whose data `is_text` or not: `rest`, and what `read` gives.

    A `DamagedGzipError` where they hold a further member, or begin nearly as one does: then the file is damaged.
    A `UserError` where the data and these bytes are text.
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
