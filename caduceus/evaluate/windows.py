"""Bases for a model: checked sequences, and windows of a genome that may reach beyond a contig's ends.

Imports no torch.
"""

from pathlib import Path

import numpy as np

from caduceus.alphabet import IS_IUPAC_BYTE
from caduceus.errors import UserError
from data_prep.genome.genome import Genome, open_genome
from data_prep.plan.aliases import AliasTable, read_aliases
from data_prep.plan.contigs import Selection

_UPPER_DNA = bytes.maketrans(b"acgturyswkmbdhvnU", b"ACGTTRYSWKMBDHVNT")


def checked_bases(text: str, place: str) -> np.ndarray:
    """The bases of a sequence as upper-case ASCII, (L,) uint8; U is read as T. Raises `UserError`, which names `place`,
    for other text.
    """
    text = text.strip()
    if not text:
        raise UserError(f"{place}: the sequence is empty")
    bases = np.frombuffer(text.encode(errors="replace").translate(_UPPER_DNA), np.uint8)
    wrong = ~IS_IUPAC_BYTE[bases]
    if wrong.any():
        first = int(wrong.argmax())
        shown = text[first] if text.isascii() else "a character that is not ASCII"
        raise UserError(
            f"{place}: {shown!r} at base {first + 1:,} of the sequence is not a base; use A, C, G, T, N or IUPAC codes"
        )
    return bases


def allele_bases(text: str) -> str:
    """The text of an allele in upper case, with U read as T."""
    return text.upper().replace("U", "T")


def upper_case(bases: np.ndarray) -> np.ndarray:
    """ASCII bases in upper case, (L,) uint8."""
    return np.frombuffer(bases.tobytes().translate(_UPPER_DNA), np.uint8)


class Windows:
    """A genome that is read in windows, and whose contigs are found by any of their names."""

    def __init__(self, genome: str | Path, aliases: str | Path | None = None) -> None:
        self.genome: Genome = open_genome(genome)
        table = read_aliases(Path(aliases)) if aliases is not None else AliasTable()
        self._names = Selection(self.genome.contigs, {}, table)
        self._found: dict[str, str | None] = {}

    @property
    def contigs(self) -> dict[str, int]:
        return self.genome.contigs

    def find(self, name: str) -> str | None:
        """The contig that a name means: of the same name, by the table of aliases, or with `chr` added or removed. None
        if none.
        """
        if name not in self._found:
            self._found[name] = self._names.find(name)
        return self._found[name]

    def require(self, name: str, place: str, advice: str = "--aliases takes a table of names") -> str:
        """Like `find`, but raises `UserError`, which ends with `advice`, where a name means no contig."""
        found = self.find(name)
        if found is None:
            known = ", ".join(list(self.contigs)[:5]) + (", …" if len(self.contigs) > 5 else "")
            raise UserError(f"{place}: the genome has no contig {name!r}, but {known}; {advice}")
        return found

    def read(self, contig: str, start: int, end: int) -> np.ndarray:
        """Upper-case ASCII of 0-based [start, end), (end - start,) uint8, with N beyond the contig's ends."""
        inside = max(start, 0), max(min(end, self.contigs[contig]), max(start, 0))
        read = self.genome.read(contig, *inside).translate(_UPPER_DNA) if inside[0] < inside[1] else b""
        left = min(max(-start, 0), end - start)
        return np.frombuffer(b"N" * left + read + b"N" * (end - start - left - len(read)), np.uint8)
