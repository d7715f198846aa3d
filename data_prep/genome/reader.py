"""What a reader of a genome's format does, and which formats there are."""

from typing import Protocol

FORMATS = "FASTA (plain, gzip or bgzip) or .2bit"
"""What genome files may be, as help and messages say it."""


class Reader(Protocol):
    """A genome's file, opened and checked. Can be pickled and used in several processes at once."""

    contigs: dict[str, int]
    """Name -> length in bases, in the file's order. At least one has bases."""
    descriptions: dict[str, str]
    """Name -> the whole header, by which organelles and versions are told."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over in the file, or read as something else."""

    @property
    def sha256(self) -> str:
        """That of the input file's bytes."""

    def read(self, contig: str, start: int, end: int) -> bytes:
        """Bases start … end-1 of a contig as ASCII, repeats in lower case; the caller has checked the range."""
