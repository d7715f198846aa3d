"""A genome of any format: contigs, lengths and `read(contig, start, end)`."""

import os
from pathlib import Path

from caduceus.errors import UserError
from caduceus.gunzip import GZIP_MAGIC
from caduceus.patience import exists, is_file, patient, patiently
from data_prep.genome.fasta import open_fasta
from data_prep.genome.reader import FORMATS, Reader
from data_prep.genome.twobit import MAGIC, TwoBitReader


class Genome:
    """Random access to the bases of a genome file. Can be pickled and used in several processes at once.

    `contigs`: name (first word of the header) -> length in bases, in the file's order. `descriptions`: name -> the
    whole header. `sha256`: of the input file's bytes.
    """

    def __init__(self, path: Path, reader: Reader) -> None:
        self.path = path
        self._reader = reader
        self.contigs: dict[str, int] = reader.contigs
        self.descriptions: dict[str, str] = reader.descriptions

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines about what was passed over in the file, or read as something else."""
        return self._reader.notes

    @property
    def sha256(self) -> str:
        return self._reader.sha256

    def read(self, contig: str, start: int, end: int) -> bytes:
        """The `end - start` bases of 0-based half-open [start, end), ASCII with case and IUPAC codes as stored.

        Raises `ValueError` for an unknown contig, or a range outside of it.
        """
        if contig not in self.contigs:
            raise ValueError(f"{self.path}: no contig {contig!r}")
        if not 0 <= start <= end <= self.contigs[contig]:
            raise ValueError(f"{self.path}: {contig}:{start}-{end} is outside 0-{self.contigs[contig]}")
        return self._reader.read(contig, start, end)


def default_cache_dir() -> Path:
    """The default folder for tables and unpacked genomes: $XDG_CACHE_HOME/caduceus/genomes."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "caduceus" / "genomes"


@patient
def estimated_bases(path: Path) -> int:
    """Roughly how many bases a genome file holds, by its size: four per byte where it is .2bit or compressed."""
    with path.open("rb") as file:
        beginning = file.read(4)
    return patiently(path.stat).st_size * (4 if beginning in MAGIC or beginning.startswith(GZIP_MAGIC) else 1)


def open_genome(path: str | Path, cache_dir: str | Path | None = None) -> Genome:
    """Open a genome file; its content, not its name, tells the format.

    `cache_dir` is for bases that must be unpacked (plain gzip, lines of unequal length) and for the tables of files in
    read-only folders; default: `default_cache_dir()`. Raises `UserError` where the file is not sound.
    """
    path = Path(path)
    if not exists(path):
        raise UserError(f"{path}: no such file; give {FORMATS}")
    if not is_file(path):
        raise UserError(f"{path}: not a regular file; give {FORMATS}")
    try:
        with path.open("rb") as file:
            is_twobit = file.read(4) in MAGIC
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    if is_twobit:
        return Genome(path, TwoBitReader(path))
    return Genome(path, open_fasta(path, Path(cache_dir) if cache_dir is not None else default_cache_dir()))
