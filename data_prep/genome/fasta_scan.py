"""One streaming pass over FASTA text: checks every byte and finds where each contig's bases lie."""

import re
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

import numpy as np

from caduceus.alphabet import IS_IUPAC_BYTE
from caduceus.errors import UserError
from data_prep.genome.reader import FORMATS

MAX_HEADER = 1 << 20
_ALLOWED = np.flatnonzero(IS_IUPAC_BYTE).astype(np.uint8).tobytes()
_LINE_ENDS = b"\r\n"
_LOOKS_LIKE = (
    (re.compile(rb"@"), "FASTQ"),
    (re.compile(rb"<"), "a web page, perhaps of a failed download"),
    (re.compile(rb"LOCUS "), "GenBank"),
    (re.compile(rb"ID   "), "EMBL"),
    (re.compile(rb"##gff|##fileformat"), "GFF or VCF"),
    (re.compile(rb"\x28\xb5\x2f\xfd|BZh|\xfd7zXZ|PK\x03\x04"), "a compressed file that is neither gzip nor bgzip"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16 text"),
    (re.compile(rb".{0,512}\x00", re.DOTALL), "binary"),
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"


@dataclass
class Contig:
    """A row of a .fai table, and the header that its name is from.

    `line_bases` and `line_width` are the bases and bytes of a full line. `regular`: each line but the last is full, so
    that these two numbers are enough to find every base.
    """

    name: str
    description: str
    offset: int  # bytes from the start of the text to the first base
    length: int = 0  # bases
    line_bases: int = 0
    line_width: int = 0
    regular: bool = True


class FastaScanner:
    """Takes the text of a FASTA in pieces of any size; `contigs` is complete after `finish`.

    `notes` says what was passed over: a byte order mark and blank lines before the first record, and in headers of
    several titles all but the first. `has_uracil`: whether a base is U, as in RNA. The bases alone, contig after
    contig, without headers and line ends, are written to `bases` if it is given. Raises `UserError`, which names file,
    contig and line, for anything that is not FASTA with IUPAC bases.
    """

    def __init__(self, path: object, bases: BinaryIO | None = None) -> None:
        self.contigs: dict[str, Contig] = {}
        self.notes: list[str] = []
        self.has_uracil = False
        self._path, self._sink = path, bases
        self._position = 0  # bytes of text taken so far
        self._line = 1  # number of the line that the next byte belongs to
        self._at_line_start = True
        self._header: bytearray | None = None  # a header whose end has not come yet
        self._contig: Contig | None = None
        self._open_width = 0  # bytes of the unfinished sequence line
        self._ended = False  # the contig has had a line that is not full: only blank lines may follow
        self._held = b""  # a carriage return at the end of a piece, kept until its line feed comes
        self._several_titles = 0  # headers with more than one title

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the text."""
        piece = self._held + piece
        self._held = b""
        if not piece:
            return
        if self._position == 0:
            piece = self._skip_beginning(piece)
        if piece.endswith(b"\r"):
            self._held, piece = b"\r", piece[:-1]
        self._take(piece)

    def finish(self) -> None:
        """Note that the text is at its end, and check the whole."""
        held, self._held = self._held, b""
        if self._position == 0:
            if held.removeprefix(_BYTE_ORDER_MARK).strip(_BLANK):
                self._refuse_beginning(held, 1)
            raise UserError(f"{self._path}: is empty; a FASTA with at least one contig is needed")
        if held:  # a carriage return without a line feed ends the last line
            self._take(b"\r\n")
        if self._header is not None:
            self._begin_contig()
        self._end_contig()
        if not any(contig.length for contig in self.contigs.values()):
            raise UserError(f"{self._path}: holds no bases, only {len(self.contigs)} header(s)")
        if self._several_titles:
            self.notes.append(f"{self._several_titles} headers hold several titles by Ctrl-A: the first was read")

    def _skip_beginning(self, piece: bytes) -> bytes:
        """The part of `piece` after a byte order mark and blank lines. Until the first record comes it is empty, and
        `piece` is held.
        """
        text = piece.removeprefix(_BYTE_ORDER_MARK)
        record = text.lstrip(_BLANK)
        if not record or _BYTE_ORDER_MARK.startswith(record):
            self._held = piece
            return b""
        blank = text[: len(text) - len(record)]
        if not record.startswith(b">") or blank.rstrip(b" \t") != blank:
            self._refuse_beginning(record, 1 + blank.count(b"\n"))
        if text != piece:
            self.notes.append("a byte order mark (UTF-8) stands before the first record: passed over")
        if blank:
            self._line += blank.count(b"\n")
            self.notes.append("blank lines stand before the first record: passed over")
        self._position = len(piece) - len(record)
        return record

    def _refuse_beginning(self, record: bytes, line: int) -> NoReturn:
        for pattern, kind in _LOOKS_LIKE:
            if pattern.match(record):
                raise UserError(f"{self._path}: not a FASTA (it looks like {kind}); convert or download it again")
        raise UserError(f"{self._path}: not a FASTA: line {line} does not begin with '>'; give {FORMATS}")

    def _take(self, piece: bytes) -> None:
        at = 0
        while at < len(piece):
            if self._header is not None:
                at = self._take_header(piece, at)
            elif self._at_line_start and piece[at] == ord(">"):
                self._end_contig()
                self._header = bytearray()
                at += 1
            else:
                mark = piece.find(b">", at)
                stop = len(piece) if mark < 0 else max(mark, at + 1)  # within a line it is taken, and refused
                self._take_sequence(piece[at:stop])
                at = stop
        self._position += len(piece)

    def _take_header(self, piece: bytes, at: int) -> int:
        end = piece.find(b"\n", at)
        stop = end if end >= 0 else len(piece)
        self._header += piece[at:stop]
        if len(self._header) > MAX_HEADER:
            raise UserError(f"{self._path}: line {self._line}: the header is over {MAX_HEADER:,} bytes; not a FASTA")
        if end < 0:
            return stop
        self._begin_contig(offset=self._position + end + 1)
        self._line += 1
        return end + 1

    def _begin_contig(self, offset: int | None = None) -> None:
        header = self._header.removesuffix(b"\r").decode("utf-8", "replace").strip()
        self._header = None
        self._at_line_start = True
        first_title, *others = header.split("\x01")  # NCBI joins the titles of equal sequences
        if others and first_title.strip():
            header = first_title.strip()
            self._several_titles += 1
        if "\r" in header:
            raise UserError(f"{self._path}: line {self._line}: lines end in CR alone; convert the file to LF line ends")
        name = header.split(maxsplit=1)[0] if header else ""
        if not name:
            raise UserError(f"{self._path}: line {self._line}: a header without a name; write one after '>'")
        if not name.isprintable() or "\ufffd" in name:
            raise UserError(f"{self._path}: line {self._line}: the contig name is not text; the file is damaged")
        if name in self.contigs:
            raise UserError(f"{self._path}: line {self._line}: a second contig named {name!r}; rename one")
        self._contig = Contig(name, header, self._position if offset is None else offset)
        self._open_width, self._ended = 0, False
        self.contigs[name] = self._contig

    def _take_sequence(self, text: bytes) -> None:
        """Take the next sequence lines, or parts of lines, of the current contig; CR LF pairs are never split."""
        has_cr = b"\r" in text
        if text.translate(None, _ALLOWED + _LINE_ENDS) or (has_cr and text.count(b"\r") != text.count(b"\r\n")):
            self._refuse_text(text)
        bases = text.replace(b"\n", b"")
        if has_cr:
            bases = bases.replace(b"\r", b"")
        if self._sink is not None:
            self._sink.write(bases)
        self.has_uracil = self.has_uracil or b"U" in text or b"u" in text
        characters = np.frombuffer(text, np.uint8)
        line_feeds = np.flatnonzero(characters == ord("\n"))
        self._contig.length += len(bases)
        self._line += len(line_feeds)
        self._at_line_start = text.endswith(b"\n")
        if not self._contig.regular:
            return
        if not len(line_feeds):
            self._open_width += len(text)
            return
        widths = np.diff(line_feeds, prepend=-1)
        widths[0] += self._open_width
        self._open_width = len(text) - 1 - int(line_feeds[-1])
        ends = 1 + (characters[line_feeds - 1] == ord("\r")) if has_cr else 1
        self._measure_lines(widths, widths - ends)

    def _measure_lines(self, widths: np.ndarray, bases: np.ndarray) -> None:
        """Check that the contig's next lines are as long as those before; `widths` and `bases`: bytes and bases of
        each.
        """
        contig = self._contig
        if not contig.line_width:
            contig.line_bases, contig.line_width = int(bases[0]), int(widths[0])
        if not self._ended:
            odd = np.flatnonzero((bases != contig.line_bases) | (widths != contig.line_width))
            if not len(odd):
                return
            self._ended = True
            contig.regular = bool(bases[odd[0]] <= contig.line_bases)
            bases = bases[odd[0] + 1 :]
        if bases.any():
            contig.regular = False

    def _end_contig(self) -> None:
        """Count a last line without a line end."""
        contig = self._contig
        if contig is None:
            return
        if self._open_width:
            if not contig.line_width:
                contig.line_bases, contig.line_width = self._open_width, self._open_width + 1
            elif self._ended or self._open_width > contig.line_bases:
                contig.regular = False
        self._contig = None

    def _refuse_text(self, text: bytes) -> None:
        wrong = min(
            (match.start() for match in (_BAD_BYTE.search(text), _LONE_CR.search(text)) if match is not None),
        )
        line = self._line + text.count(b"\n", 0, wrong)
        character = chr(text[wrong]) if 32 <= text[wrong] < 127 else f"\\x{text[wrong]:02x}"
        raise UserError(
            f"{self._path}: line {line}: contig {self._contig.name!r} holds '{character}', which is not an IUPAC base; "
            "remove or replace it"
        )


_BAD_BYTE = re.compile(b"[^" + re.escape(_ALLOWED + _LINE_ENDS) + b"]")
_LONE_CR = re.compile(rb"\r(?!\n)")
