"""Tars of any origin, read once from their beginning; what is damaged is told and passed over. Imports no torch.

The standard library's `tarfile` reads the headers. It is told to pass over blocks that are no header, so after damage
it goes on at the next sound one, and it is watched while it does so, because it says nothing about what it passes over.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from caduceus.data.decompression import LONGEST_MAGIC, OTHER_PROGRAMS, Decompressed, DecompressionError, pieces_of
from caduceus.data.remote import open_address, reading_problem
from caduceus.errors import UserError

_END_MARKER_BLOCKS = 2
_CHUNK = 1 << 20
_EXTENSIONS_NAMED = 8


class Remark(str):
    """A line about a tar that is told and is no damage."""


@dataclass
class TarFindings:
    """What was found in one tar: the kinds of problems, each with how often and where first, and other extensions."""

    address: str
    problems: dict[str, tuple[int, str]] = field(default_factory=dict)
    other_extensions: set[str] = field(default_factory=set)
    remarks: dict[str, None] = field(default_factory=dict)
    """What is told and is no damage, in order."""

    def add(self, problem: str, where: str = "") -> None:
        count, first = self.problems.get(problem, (0, where))
        self.problems[problem] = count + 1, first

    def line(self) -> str | None:
        """One line about all problems; None for a sound tar."""
        return f"{self.address}: {'; '.join(map(self._describe, self.problems))}" if self.problems else None

    def remark(self) -> Remark | None:
        """One line about what is no damage; None where there is nothing to tell."""
        return Remark(f"{self.address}: {'; '.join(self.remarks)}") if self.remarks else None

    def _describe(self, problem: str) -> str:
        count, first = self.problems[problem]
        more = f" and {count - 1:,} more" if count > 1 else ""
        return f"{problem} ({first}{more})" if first else problem


def read_members(findings: TarFindings, extension: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files `*.extension` of the tar at `findings.address`, in order, each name once.

    The tar may be compressed by gzip, bzip2 or xz. Hidden files are passed over. Never raises for what is wrong with
    the tar: `findings` tells it, and as much is read as can be. Raises `UserError` for an address of an unknown scheme.
    """
    try:
        with open_address(findings.address) as raw:
            file = _Forward(raw)
            start = file.peek(LONGEST_MAGIC)
            if program := next((name for magic, name in OTHER_PROGRAMS.items() if start.startswith(magic)), None):
                findings.add(f"is compressed by {program}, which is not read; data.path='pipe:{program} -dc FILE' is")
                return
            pieces = pieces_of(start, file)
            yield from _members(_Forward(Decompressed(pieces)) if pieces else file, findings, f".{extension.lower()}")
            if pieces and pieces.passed_over:
                told = f"{pieces.passed_over:,} bytes stand behind the end of its compressed data: passed over"
                findings.remarks[told] = None
    except UserError:
        raise
    except DecompressionError as error:
        findings.add(f"cannot be decompressed any further ({error})")
    except Exception as error:  # each decompressor and file system raises classes of its own
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
                    findings.add("members that are links or no files are left out", name)
                elif name in seen:
                    findings.add("members of a name that was there before are left out", name)
                else:
                    seen.add(name)
                    yield name, tar.extractfile(member).read()
            tar.report_end()
    except tarfile.ReadError:  # of tarfile, only what the end of the file cuts short is left to raise
        if name:
            findings.add(f"ends inside {name}, of which nothing is used")
        elif not findings.problems:
            findings.add("holds nothing")


class _Header(tarfile.TarInfo):
    """A header that tells its tar what was no header."""

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
    """A tar read forward, past what is no header; `findings` gets what was passed over."""

    def __init__(self, file: "_Forward", findings: TarFindings) -> None:
        self.findings = findings
        self.zero_blocks = 0
        self.in_garbage = self.is_cut = self.any_header = False
        super().__init__(fileobj=file, mode="r", tarinfo=_Header, ignore_zeros=True, errors="surrogateescape")

    def saw_garbage(self, at: int) -> None:
        if not self.in_garbage and self.any_header:
            self.findings.add("damaged where a header is due; read on from the next one", f"byte {at:,}")
        self.in_garbage, self.zero_blocks = True, 0

    def saw_header(self, at: int) -> None:
        if self.zero_blocks and self.any_header:
            self.findings.add("zeros between members: an end, or members that are lost; read on", f"byte {at:,}")
        elif self.in_garbage and not self.any_header:
            self.findings.add("damaged where its first header is due; read on from the next one")
        self.any_header, self.in_garbage, self.zero_blocks = True, False, 0

    def report_end(self) -> None:
        """Report what the end of the file shows; the caller has read its last member."""
        if not self.any_header and not self.zero_blocks:
            self.findings.add("is no tar")
        elif self.zero_blocks < _END_MARKER_BLOCKS and not self.is_cut:
            self.findings.add("has no end marker, so what follows may have been cut off")


class _Forward:
    """A file that can be read once from its beginning, with the position and the forward seek that `tarfile` wants."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._ahead = b""
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """`size` bytes; fewer only where the file ends; all of it for -1."""
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
        """The next `size` bytes, which stay to be read."""
        self._ahead = self.read(size)
        self._position -= len(self._ahead)
        return self._ahead

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass
        return self._position
