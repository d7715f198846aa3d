"""Reads regions of a checked FASTA, plain or bgzip, with pyfaidx."""

import os
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

from pyfaidx import BgzfBlock, Faidx, FetchError

from caduceus.errors import UserError
from data_prep.genome.pinned import PinnedFile

_PIECE = 1 << 20
"""Bases read at once: longer reads of bgzip take quadratic time."""


class _Block(BgzfBlock):
    """A block that pyfaidx also finds for the block's first byte.

    Unchanged, pyfaidx reads from the end of the block before, which fails where that has 65,536 bytes.
    """

    def __lt__(self, position: float) -> bool:
        return self.ustart <= position


class FastaRegions:
    """Random access through the bytes of a .fai table and, for bgzip, of a .gzi.

    pyfaidx takes its tables from files beside the FASTA, and recognises bgzip by the file's name. Here it gets the
    tables that were checked against the file, through a link with a fitting name, whatever lies beside the file. Safe
    across fork and pickle: each process opens the file for itself.
    """

    def __init__(self, file: PinnedFile, fai: bytes, gzi: bytes | None) -> None:
        self.path = file.path
        self._file, self._fai, self._gzi = file, fai, gzi
        self._opened: Faidx | None = None
        self._process = 0

    def read(self, contig: str, start: int, end: int) -> bytes:
        """Bases start … end-1 of a contig, at least one, as the file has them; the caller has checked the range."""
        if self._opened is None or self._process != os.getpid():
            self._opened, self._process = self._open(), os.getpid()
        pieces = ((first, min(first + _PIECE, end)) for first in range(start, end, _PIECE))
        try:
            bases = "".join(self._opened.fetch(contig, first + 1, last) for first, last in pieces).encode("ascii")
        except (FetchError, OSError, ValueError, RuntimeError, zlib.error, struct.error) as error:
            self._file.check_unchanged()
            raise UserError(f"{self.path}: contig {contig!r} cannot be read at {start}-{end} ({error})") from None
        if len(bases) != end - start:
            raise UserError(f"{self.path}: contig {contig!r} changed while in use; run the command again")
        return bases

    def _open(self) -> Faidx:
        with tempfile.TemporaryDirectory(prefix="caduceus-fasta-") as folder:
            link = Path(folder) / ("genome.fa" if self._gzi is None else "genome.fa.gz")
            link.symlink_to(self.path.absolute())
            Path(f"{link}.fai").write_bytes(self._fai)
            if self._gzi is not None:
                Path(f"{link}.gzi").write_bytes(self._gzi)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of tables older than a file dated in the future
                try:
                    opened = Faidx(str(link), as_raw=True, rebuild=False, build_index=False)
                except OSError as error:
                    raise UserError(f"{self.path}: cannot be opened ({error})") from None
            self._file.require_same(link)
        if self._gzi is not None:
            opened.gzi_index = [_Block(*block) for block in opened.gzi_index]
        return opened

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}
