"""Reads tars of any origin once, from their beginning; damage is reported and passed over. Imports no torch.

The standard library's `tarfile` reads the headers. It passes over blocks that are not headers, so after damage it goes
on at the next sound header. As it does not report what it passes over, the classes here watch it.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from caduceus.data.decompression import (
    LONGEST_MAGIC,
    OTHER_PROGRAMS,
    Decompressed,
    DecompressionError,
    decompressed_pieces,
)
from caduceus.data.remote import open_address, reading_problem
from caduceus.errors import UserError

_END_MARKER_BLOCKS = 2
_CHUNK = 1 << 20
_EXTENSIONS_NAMED = 8


class Remark(str):
    """A line about a tar that is reported, but is not damage."""


@dataclass
class TarFindings:
    """What was found in one tar: each kind of problem, with its number and first place, and the extensions of other
    members.
    """

    address: str
    problems: dict[str, tuple[int, str]] = field(default_factory=dict)
    other_extensions: set[str] = field(default_factory=set)
    remarks: dict[str, None] = field(default_factory=dict)
    """What is reported but is not damage, in order."""

    def add(self, problem: str, where: str = "") -> None:
        count, first = self.problems.get(problem, (0, where))
        self.problems[problem] = count + 1, first

    def line(self) -> str | None:
        """One line about all problems; None for a sound tar."""
        return f"{self.address}: {'; '.join(map(self._describe, self.problems))}" if self.problems else None

    def remark(self) -> Remark | None:
        """One line of all remarks; None where there are none."""
        return Remark(f"{self.address}: {'; '.join(self.remarks)}") if self.remarks else None

    def _describe(self, problem: str) -> str:
        count, first = self.problems[problem]
        more = f" and {count - 1:,} more" if count > 1 else ""
        return f"{problem} ({first}{more})" if first else problem


def read_members(findings: TarFindings, extension: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files `*.extension` of the tar at `findings.address`, in order, each name once.

    The tar may be compressed with gzip, bzip2 or xz. Hidden files are passed over. Damage of the tar raises nothing:
    `findings` has it, and as much as possible is read. Raises `UserError` for an address of an unknown scheme.
    """
    try:
        with open_address(findings.address) as raw:
            file = _Forward(raw)
            start = file.peek(LONGEST_MAGIC)
            if program := next((name for magic, name in OTHER_PROGRAMS.items() if start.startswith(magic)), None):
                findings.add(
                    f"is compressed with {program}, which is not supported; data.path='pipe:{program} -dc FILE' is"
                )
                return
            pieces = decompressed_pieces(start, file)
            yield from _members(_Forward(Decompressed(pieces)) if pieces else file, findings, f".{extension.lower()}")
            if pieces and pieces.passed_over:
                told = f"{pieces.passed_over:,} bytes after the end of its compressed data are passed over"
                findings.remarks[told] = None
    except UserError:
        raise
    except DecompressionError as error:
        findings.add(f"cannot be decompressed any further ({error})")
    except Exception as error:  # each decompressor and file system raises its own classes
        findings.add(reading_problem(findings.address, error))


def _members(file: "_Forward", findings: TarFindings, suffix: str) -> Iterator[tuple[str, bytes]]:
    seen: set[str] = set()
    name = ""
    try:
        with _WatchedTar(file, findings) as tar:
            while tar.any_header and (member := tar.next()) is not None:
                tar.members.clear()
                name = member.name.encode("utf-8", "replace").decode()
                base = name.rpartition("/")[2]
                if base.startswith(".") or not base.lower().endswith(suffix):
                    if len(findings.other_extensions) < _EXTENSIONS_NAMED and member.isreg() and "." in base[1:]:
                        findings.other_extensions.add(base.rpartition(".")[2])
                elif not member.isreg():
                    findings.add("members that are links or not files are left out", name)
                elif name in seen:
                    findings.add("members with the name of an earlier one are left out", name)
                else:
                    seen.add(name)
                    yield name, tar.extractfile(member).read()
            tar.report_end()
    except tarfile.ReadError:  # tarfile raises this only where the end of the file cuts a member short
        if name:
            findings.add(f"ends inside {name}, which is left out")
        elif not findings.problems:
            findings.add("holds nothing")


class _Header(tarfile.TarInfo):
    """A header that reports blocks that are not headers to its tar."""

    @classmethod
    def fromtarfile(cls, tar: "_WatchedTar") -> tarfile.TarInfo:
        at = tar.fileobj.tell()
        try:
            member = super().fromtarfile(tar)
        except tarfile.EmptyHeaderError:
            raise
        except tarfile.TruncatedHeaderError:
            if tar.any_header or at == 0:
                tar.findings.add(f"ends inside a header, at byte {tar.fileobj.tell():,}")
                tar.is_cut = True
            raise
        except tarfile.EOFHeaderError:
            tar.zero_blocks += 1
            tar.in_garbage = False
            raise
        except (tarfile.HeaderError, ValueError, IndexError) as error:  # ValueError: a number or text in an extension
            tar.saw_garbage(at)
            raise tarfile.InvalidHeaderError(str(error)) from None
        tar.saw_header(at)
        return member


class _WatchedTar(tarfile.TarFile):
    """A tar that is read forward, past blocks that are not headers; `findings` gets what was passed over."""

    def __init__(self, file: "_Forward", findings: TarFindings) -> None:
        self.findings = findings
        self.zero_blocks = 0
        self.in_garbage = self.is_cut = self.any_header = False
        super().__init__(fileobj=file, mode="r", tarinfo=_Header, ignore_zeros=True, errors="surrogateescape")

    def saw_garbage(self, at: int) -> None:
        if not self.in_garbage and self.any_header:
            self.findings.add("damaged where a header is expected; reading goes on at the next header", f"byte {at:,}")
        self.in_garbage, self.zero_blocks = True, 0

    def saw_header(self, at: int) -> None:
        if self.zero_blocks and self.any_header:
            self.findings.add("zeros between members: an end marker, or lost members; reading goes on", f"byte {at:,}")
        elif self.in_garbage and not self.any_header:
            self.findings.add("damaged where its first header is expected; reading goes on at the next header")
        self.any_header, self.in_garbage, self.zero_blocks = True, False, 0

    def report_end(self) -> None:
        """Report what the end of the file shows, after its last member was read."""
        if not self.any_header and not self.zero_blocks:
            self.findings.add("is no tar")
        elif self.zero_blocks < _END_MARKER_BLOCKS and not self.is_cut:
            self.findings.add("has no end marker, so what follows may have been cut off")


class _Forward:
    """A file that can be read once, from its beginning, with the position and the forward seek that `tarfile` needs."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._ahead = b""
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end of the file; -1 reads the rest."""
        content = bytearray(self._ahead if size < 0 else self._ahead[:size])
        self._ahead = self._ahead[len(content) :]
        while (wanted := _CHUNK if size < 0 else size - len(content)) and (
            piece := self._file.read(min(wanted, _CHUNK))
        ):
            content += piece
        self._position += len(content)
        return bytes(content)

    def readinto(self, buffer: Any) -> int:
        piece = self.read(min(len(buffer), _CHUNK))
        buffer[: len(piece)] = piece
        return len(piece)

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, without reading past them."""
        self._ahead = self.read(size)
        self._position -= len(self._ahead)
        return self._ahead

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass
        return self._position
