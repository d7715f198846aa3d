"""The interface of readers of genome formats, and the formats that there are."""

from typing import Protocol

FORMATS = "FASTA (plain, gzip or bgzip) or .2bit"
"""The formats of genome files, as help and messages name them."""


class Reader(Protocol):
    """A genome file, opened and checked. Can be pickled and used in several processes at once."""

    contigs: dict[str, int]
    """Name -> length in bases, in the file's order. At least one has bases."""
    descriptions: dict[str, str]
    """Name -> the whole header, which helps to recognise organelles and versions."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines about what was passed over in the file, or read as something else."""

    @property
    def sha256(self) -> str:
        """sha256 of the input file's bytes."""

    def read(self, contig: str, start: int, end: int) -> bytes:
        """Bases start … end-1 of a contig as ASCII, repeats in lower case; the caller has checked the range."""
