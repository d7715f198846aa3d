"""FASTA genomes (plain, gzip or bgzip) with random access, through a .fai table that was checked against the file.

When a file is opened for the first time, it is read once, every byte is checked, and FILE.fai (and FILE.gzi) is written
beside it, or into the cache directory where its folder is read-only or holds a table that does not fit. A record in the
cache directory says which file a table was made from (size, time of change, sha256), and has the sha256 of the table,
so that a table from elsewhere is never trusted unchecked. For files that allow no random access (plain gzip, lines of
unequal length), the bare bases are kept there.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from caduceus.errors import UserError
from caduceus.files import CHUNK, keep_first, temporary_name, write_atomically
from caduceus.gunzip import GZIP_MAGIC, Gunzip
from caduceus.patience import is_file, patiently
from data_prep.genome.bgzf import BlockScanner, BlockTable, is_bgzf
from data_prep.genome.fasta_scan import Contig, FastaScanner
from data_prep.genome.pinned import PinnedFile, SequentialReader
from data_prep.genome.regions import FastaRegions
from data_prep.progress import Progress, note

RACY_NS = 2_000_000_000
"""Seconds. A file that changed so shortly before the scan may change again within the resolution of its time stamp,
unnoticed.
"""
_DNA_OF_RNA = bytes.maketrans(b"Uu", b"Tt")


@dataclass(frozen=True)
class Tables:
    """What reading needs to know about a FASTA: where its bases lie, and what was checked."""

    contigs: dict[str, Contig]
    sha256: str  # sha256 of the input file
    blocks: BlockTable | None = None  # the block table of a bgzip file
    has_uracil: bool = False
    notes: tuple[str, ...] = ()


class FastaReader:
    """Contigs of a FASTA. Case and IUPAC codes are read as stored, but U is read as T."""

    def __init__(self, file: PinnedFile, tables: Tables) -> None:
        gzi = tables.blocks.to_bytes() if tables.blocks is not None else None
        self._regions = FastaRegions(file, _format_fai(tables.contigs), gzi)
        self.sha256 = tables.sha256
        self.notes = tables.notes
        self._has_uracil = tables.has_uracil
        self.contigs = {name: contig.length for name, contig in tables.contigs.items()}
        self.descriptions = {name: contig.description for name, contig in tables.contigs.items()}

    def read(self, contig: str, start: int, end: int) -> bytes:
        """Bases start … end-1 of a contig as ASCII; the caller has checked the range."""
        if start == end:
            return b""
        bases = self._regions.read(contig, start, end)
        return bases.translate(_DNA_OF_RNA) if self._has_uracil else bases


def open_fasta(path: Path, cache_dir: Path) -> FastaReader:
    """Open a FASTA (plain, gzip or bgzip). Raises `UserError`, which names file, contig and line, where it is not
    sound.
    """
    file = PinnedFile(path)
    beginning = file.pread(0, min(64 << 10, file.size))
    seekable = not beginning.startswith(GZIP_MAGIC) or is_bgzf(beginning)
    store = _Store(file, cache_dir)
    tables, bases_path = store.load()
    if tables is None:
        tables = _scan(file) if seekable else None
        if tables is not None and all(contig.regular for contig in tables.contigs.values()):
            store.save(tables)
        else:
            tables, bases_path = store.extract_bases()
    if bases_path is not None:
        return FastaReader(PinnedFile(bases_path), tables)
    return FastaReader(file, tables)


def _scan(file: PinnedFile, bases: BinaryIO | None = None, label: str = "checking") -> Tables:
    """Read the whole file once; the bases alone are written to `bases`."""
    scanner = FastaScanner(file.path, bases)
    blocks = gunzip = None
    with Progress(f"{label} {file.path.name}", file.size) as progress:
        reader = SequentialReader(file, progress)
        beginning = file.pread(0, min(64 << 10, file.size))
        if is_bgzf(beginning):
            blocks = BlockScanner(file.path)
            pieces = blocks.pieces(reader)
        elif beginning.startswith(GZIP_MAGIC):
            gunzip = Gunzip(file.path, reader.read, is_text=True)
            pieces = iter(gunzip)
        else:
            pieces = iter(lambda: reader.read(CHUNK), b"")
        for piece in pieces:
            scanner.feed(piece)
        scanner.finish()
        notes = _notes(scanner, blocks or gunzip)
        return Tables(scanner.contigs, reader.sha256(), blocks.table() if blocks else None, scanner.has_uracil, notes)


def _notes(scanner: FastaScanner, compressed: Gunzip | BlockScanner | None) -> tuple[str, ...]:
    notes = list(scanner.notes)
    if compressed is not None and compressed.passed_over:
        notes.append(f"{compressed.passed_over:,} bytes stand behind the end of the gzip stream: passed over")
    if scanner.has_uracil:
        notes.append("holds RNA (U): every U is read as T")
    return tuple(notes)


class _Store:
    """Tables and bare bases of one file, beside it or in the cache directory."""

    def __init__(self, file: PinnedFile, cache_dir: Path) -> None:
        self._file, self._folder = file, cache_dir
        key = hashlib.sha256(str(file.path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self._stem = cache_dir / f"{file.path.name}-{key}"
        self._scan_began = time.time_ns()

    def load(self) -> tuple[Tables | None, Path | None]:
        """The tables of an earlier scan, and the file of bare bases if there is one; None where they do not fit the
        file.
        """
        try:
            record = json.loads(self._record_path().read_bytes())
            if record["scanned_ns"] - record["mtime_ns"] < RACY_NS:
                return None, None
            if (record["size"], record["mtime_ns"]) != (self._file.size, self._file.mtime_ns):
                return None, None
            bases_path = self._bases_path(record["sha256"]) if record["bare_bases"] else None
            if bases_path is not None and patiently(bases_path.stat).st_size != record["bases"]:
                return None, None
            content = {suffix: self._find_table(suffix, digest) for suffix, digest in record["tables"].items()}
            contigs = _parse_fai(content[".fai"], record["descriptions"])
            blocks = BlockTable.from_bytes(content[".gzi"]) if ".gzi" in content else None
            notes = tuple(map(str, record["notes"]))
            return Tables(contigs, record["sha256"], blocks, bool(record["has_uracil"]), notes), bases_path
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, None

    def save(self, tables: Tables) -> None:
        """Save the tables of a file that can be read in place."""
        content = {".fai": _format_fai(tables.contigs)}
        if tables.blocks is not None:
            content[".gzi"] = tables.blocks.to_bytes()
        for suffix, table in content.items():
            self._place_table(suffix, table)
        self._save_record(tables, content, bare_bases=False)

    def extract_bases(self) -> tuple[Tables, Path]:
        """Scan the file and save its bases, contig after contig without line ends, in the cache directory."""
        temporary = temporary_name(self._cached_table(".bases"))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as bases:
                tables = _scan(self._file, bases, label="unpacking")
                bases.flush()
                os.fsync(bases.fileno())
            bases_path = self._bases_path(tables.sha256)
            keep_first(temporary, bases_path)
        except OSError as error:
            raise UserError(
                f"{self._folder}: cannot keep the bases of {self._file.path.name} here ({error.strerror}); "
                "free some space or name another folder with --cache-dir"
            ) from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        tables = replace(tables, contigs=_bare_table(tables.contigs), blocks=None)
        content = {".fai": _format_fai(tables.contigs)}
        with suppress(OSError):
            write_atomically(self._cached_table(".fai"), content[".fai"])
        self._save_record(tables, content, bare_bases=True)
        return tables, bases_path

    def _record_path(self) -> Path:
        return self._stem.with_name(f"{self._stem.name}.json")

    def _bases_path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.bases"

    def _cached_table(self, suffix: str) -> Path:
        return self._stem.with_name(self._stem.name + suffix)

    def _neighbour_table(self, suffix: str) -> Path:
        return self._file.path.with_name(self._file.path.name + suffix)

    def _find_table(self, suffix: str, digest: str) -> bytes:
        for path in (self._neighbour_table(suffix), self._cached_table(suffix)):
            with suppress(OSError):
                content = patiently(path.read_bytes)
                if hashlib.sha256(content).hexdigest() == digest:
                    return content
        raise KeyError(suffix)

    def _place_table(self, suffix: str, content: bytes) -> None:
        """Write a table beside the file, or else into the cache directory. If both fail, the genome can still
        be read.
        """
        neighbour = self._neighbour_table(suffix)
        if is_file(neighbour):
            with suppress(OSError):
                if patiently(neighbour.read_bytes) == content:
                    return
            note(f"{neighbour} does not match {self._file.path.name} and is not used; delete it to have it made anew")
        elif _is_writable(neighbour.parent):
            with suppress(OSError):
                return write_atomically(neighbour, content)
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._cached_table(suffix), content)

    def _save_record(self, tables: Tables, content: dict[str, bytes], *, bare_bases: bool) -> None:
        record = {
            "file": str(self._file.path.resolve()),
            "size": self._file.size,
            "mtime_ns": self._file.mtime_ns,
            "scanned_ns": self._scan_began,
            "sha256": tables.sha256,
            "bases": sum(contig.length for contig in tables.contigs.values()),
            "bare_bases": bare_bases,
            "has_uracil": tables.has_uracil,
            "notes": tables.notes,
            "tables": {suffix: hashlib.sha256(table).hexdigest() for suffix, table in content.items()},
            "descriptions": [contig.description for contig in tables.contigs.values()],
        }
        with suppress(OSError):  # without a record the next opening scans again
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._record_path(), json.dumps(record).encode())


def _is_writable(folder: Path) -> bool:
    """Whether files may be written here. A folder without write bits counts as read-only, for the superuser as well."""
    return bool(patiently(folder.stat).st_mode & 0o222) and os.access(folder, os.W_OK)


def _bare_table(contigs: dict[str, Contig]) -> dict[str, Contig]:
    """The table of the same contigs for a file of bare bases, one after another."""
    bare, offset = {}, 0
    for name, contig in contigs.items():
        bare[name] = Contig(name, contig.description, offset, contig.length, contig.length, contig.length)
        offset += contig.length
    return bare


def _format_fai(contigs: dict[str, Contig]) -> bytes:
    rows = ((row.name, row.length, row.offset, row.line_bases, row.line_width) for row in contigs.values())
    return "".join("\t".join(map(str, row)) + "\n" for row in rows).encode()


def _parse_fai(content: bytes, descriptions: list[str]) -> dict[str, Contig]:
    contigs = {}
    for line, description in zip(content.decode().splitlines(), descriptions, strict=True):
        name, *numbers = line.split("\t")
        length, offset, line_bases, line_width = map(int, numbers)
        contigs[name] = Contig(name, description, offset, length, line_bases, line_width)
    return contigs
