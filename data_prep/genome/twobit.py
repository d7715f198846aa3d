"""Reader of UCSC .2bit genomes in both byte orders, index versions 0 (32-bit) and 1 (64-bit offsets).

Format: https://genome.ucsc.edu/FAQ/FAQformat.html#format7
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caduceus.errors import UserError
from data_prep.genome.pinned import PinnedFile, SequentialReader
from data_prep.progress import Progress

SIGNATURE = 0x1A412743
MAGIC = {struct.pack("<I", SIGNATURE): "<", struct.pack(">I", SIGNATURE): ">"}
"""First four bytes of a file -> byte order of everything that follows."""

_BASE_CODES = np.frombuffer(b"TCAG", np.uint8)
_FOUR_BASES = _BASE_CODES[(np.arange(256)[:, None] >> np.array([6, 4, 2, 0])) & 3].copy().view(np.uint32)[:, 0]
"""(256,) uint32: the four ASCII bases that a packed byte holds, first base in the lowest address."""
_LOWER_CASE_BIT = 0x20


@dataclass(frozen=True)
class _Record:
    """Where the parts of a contig lie in the file, in bytes."""

    length: int  # bases
    n_blocks: int
    n_blocks_at: int
    mask_blocks: int
    mask_blocks_at: int
    packed_at: int


class TwoBitReader:
    """Contigs of a .2bit file, read with N and lower case as stored."""

    def __init__(self, path: str | Path) -> None:
        self._file = PinnedFile(path)
        self.notes: tuple[str, ...] = ()
        self._sha256: str | None = None
        self._loaded: tuple[str, np.ndarray, np.ndarray] | None = None
        header = self._pread(0, 16, "the header")
        if header[:4] not in MAGIC:
            raise UserError(f"{path}: not a .2bit file (wrong signature)")
        self._order = MAGIC[header[:4]]
        version, count, _ = struct.unpack(f"{self._order}III", header[4:])
        if version not in (0, 1):
            raise UserError(f"{path}: .2bit version {version} is not supported (only 0 and 1); convert it to FASTA")
        self._records = {
            name: self._read_record(name, offset) for name, offset in self._read_index(version, count).items()
        }
        self.contigs = {name: record.length for name, record in self._records.items()}
        self.descriptions = {name: name for name in self._records}
        if not any(self.contigs.values()):
            raise UserError(f"{path}: holds no bases")

    @property
    def sha256(self) -> str:
        """sha256 of the file's bytes, computed at first use."""
        if self._sha256 is None:
            with Progress(f"reading {self._file.path.name}", self._file.size) as progress:
                self._sha256 = SequentialReader(self._file, progress).sha256()
        return self._sha256

    def read(self, contig: str, start: int, end: int) -> bytes:
        """Bases start … end-1 of a contig as ASCII; the caller has checked the range."""
        if start == end:
            return b""
        record = self._records[contig]
        first, last = start // 4, (end + 3) // 4
        packed = np.frombuffer(self._pread(record.packed_at + first, last - first, contig), np.uint8)
        bases = _FOUR_BASES[packed].view(np.uint8)[start - 4 * first : end - 4 * first]
        n_blocks, mask_blocks = self._blocks(contig)
        unknown = _inside(n_blocks, start, end)
        if unknown is not None:
            bases = np.where(unknown, np.uint8(ord("N")), bases)
        masked = _inside(mask_blocks, start, end)
        if masked is not None:
            bases = bases | (masked.view(np.uint8) * np.uint8(_LOWER_CASE_BIT))
        return bases.tobytes()

    def _read_index(self, version: int, count: int) -> dict[str, int]:
        offset_format = f"{self._order}{'IQ'[version]}"
        offset_size = struct.calcsize(offset_format)
        # The index has no size field: an entry takes at most 256 + 8 bytes.
        index = self._file.pread(16, min(count * (256 + offset_size), self._file.size - 16))
        offsets: dict[str, int] = {}
        at = 0
        for number in range(count):
            end_of_name = at + 1 + index[at] if at < len(index) else len(index)
            if end_of_name + offset_size > len(index):
                raise UserError(
                    f"{self._file.path}: truncated in the index, at contig {number + 1} of {count}; download it again"
                )
            name = index[at + 1 : end_of_name].decode("utf-8", "replace")
            if not name or not name.isprintable() or "\ufffd" in name:
                raise UserError(f"{self._file.path}: contig {number + 1} has no readable name; the file is damaged")
            if name in offsets:
                raise UserError(f"{self._file.path}: two contigs are named {name!r}; rename one")
            (offsets[name],) = struct.unpack_from(offset_format, index, end_of_name)
            at = end_of_name + offset_size
        return offsets

    def _read_record(self, name: str, offset: int) -> _Record:
        length, n_blocks = struct.unpack(f"{self._order}II", self._pread(offset, 8, name))
        n_blocks_at = offset + 8
        mask_count_at = n_blocks_at + 8 * n_blocks
        (mask_blocks,) = struct.unpack(f"{self._order}I", self._pread(mask_count_at, 4, name))
        mask_blocks_at = mask_count_at + 4
        record = _Record(
            length, n_blocks, n_blocks_at, mask_blocks, mask_blocks_at, packed_at=mask_blocks_at + 8 * mask_blocks + 4
        )
        if record.packed_at + (length + 3) // 4 > self._file.size:
            raise UserError(f"{self._file.path}: truncated in contig {name!r}; download it again")
        self._read_blocks(name, n_blocks_at, n_blocks, length)
        self._read_blocks(name, mask_blocks_at, mask_blocks, length)
        return record

    def _blocks(self, contig: str) -> tuple[np.ndarray, np.ndarray]:
        """N blocks and mask blocks of a contig; those of the last contig are cached."""
        if self._loaded is None or self._loaded[0] != contig:
            record = self._records[contig]
            self._loaded = (
                contig,
                self._read_blocks(contig, record.n_blocks_at, record.n_blocks, record.length),
                self._read_blocks(contig, record.mask_blocks_at, record.mask_blocks, record.length),
            )
        return self._loaded[1:]

    def _read_blocks(self, contig: str, offset: int, count: int, length: int) -> np.ndarray:
        """(2, count) int64: starts and ends of blocks. Raises `UserError` unless these are sorted and disjoint."""
        raw = np.frombuffer(self._pread(offset, 8 * count, contig), f"{self._order}u4").astype(np.int64)
        starts, sizes = raw.reshape(2, count)
        blocks = np.stack([starts, starts + sizes])
        if (blocks[1] > length).any() or (blocks[0, 1:] < blocks[1, :-1]).any():
            raise UserError(f"{self._file.path}: contig {contig!r} has blocks out of order or range; it is damaged")
        return blocks

    def _pread(self, offset: int, count: int, what: str) -> bytes:
        if offset + count > self._file.size:
            raise UserError(f"{self._file.path}: truncated in {what}; download it again")
        return self._file.pread(offset, count)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": None}


def _inside(blocks: np.ndarray, start: int, end: int) -> np.ndarray | None:
    """(end - start,) bool: which positions lie in one of the sorted blocks; None where none does."""
    starts, ends = blocks
    first, last = np.searchsorted(ends, start, "right"), np.searchsorted(starts, end, "left")
    if first >= last:
        return None
    # Gap, block, gap, block, …, gap: the distances between successive edges.
    edges = np.clip(blocks[:, first:last].T.ravel(), start, end)
    lengths = np.diff(edges, prepend=start, append=end)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
