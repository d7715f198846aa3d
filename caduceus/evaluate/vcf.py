"""Reads and writes VCF as text: the parts of a file that are not read are kept unchanged. Imports no torch."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from caduceus.errors import UserError
from caduceus.evaluate.columns import package
from caduceus.files import temporary_name, write_atomically
from caduceus.patience import is_file
from caduceus.tables import read_lines, refuse_line, split_fields, whole_number

_INFO = 7
_COLUMNS = ("#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")


@dataclass(frozen=True)
class Record:
    """A record of a VCF: the number of its line, its fields, and from these the position (from 1) and the alleles."""

    line: int
    fields: list[str]
    contig: str
    pos: int
    ref: str
    alts: list[str]

    def info(self) -> dict[str, str]:
        """The entries of INFO, name -> value; an entry without a value has an empty one."""
        pairs = (entry.partition("=") for entry in self.fields[_INFO].split(";"))
        return {key: value for key, _, value in pairs if key not in ("", ".")}


@dataclass(frozen=True)
class Vcf:
    path: Path
    header: list[str]
    """Lines that begin with `##`."""
    columns: list[str]
    """The headings of the columns, at least eight."""
    records: list[Record]


def read_vcf(path: str | Path) -> Vcf:
    """Read a VCF (plain, gzip or bgzip). Raises `UserError`, which names the line, for a line that is not one of a VCF.

    Fields may also be separated by blanks. Genotypes and INFO are not parsed.
    """
    path = Path(path)
    header, columns, records = [], None, []
    for number, line in read_lines(path):
        if line.startswith("##"):
            header.append(line.rstrip())
        elif line.startswith("#"):
            columns = split_fields(line, tight=len(_COLUMNS))
            if columns[:5] != list(_COLUMNS[:5]):
                refuse_line(path, number, f"not the headings of a VCF: {line[:60]!r}; they are {' '.join(_COLUMNS)}")
        elif columns is None:
            refuse_line(path, number, f"not a VCF: a line that begins with #CHROM must come before {line[:40]!r}")
        else:
            records.append(_record(path, number, line))
    if columns is None:
        raise UserError(f"{path}: not a VCF: no line begins with #CHROM")
    return Vcf(path, header, [*columns, *_COLUMNS[len(columns) :]], records)


def _record(path: Path, number: int, line: str) -> Record:
    fields = split_fields(line, tight=5)
    if len(fields) < 5:
        refuse_line(path, number, f"has {len(fields)} fields; a line of a VCF has at least 8, separated by tabs")
    fields += ["."] * (len(_COLUMNS) - len(fields))
    pos = whole_number(fields[1], path, number, "POS")
    alts = [] if fields[4] in (".", "") else fields[4].split(",")
    return Record(number, fields, fields[0], pos, fields[3], alts)


def write_vcf(
    path: str | Path, vcf: Vcf, info_lines: Iterable[str], values: Sequence[Sequence[tuple[str, str]]]
) -> None:
    """Write the VCF with `values`, (key, value) pairs for each record, added to INFO; old entries of these keys are
    removed.

    A name that ends in .gz or .bgz gives bgzip, and, where the records are sorted, a tabix index beside it.
    """
    path, info_lines = Path(path), list(info_lines)
    ids = {re.match(r"##INFO=<ID=([^,]+)", line)[1] for line in info_lines}
    kept = [line for line in vcf.header if not any(line.startswith(f"##INFO=<ID={key},") for key in ids)]
    if not any(line.startswith("##fileformat=") for line in kept):
        kept.insert(0, "##fileformat=VCFv4.2")
    rows = ["\t".join(vcf.columns)]
    for record, pairs in zip(vcf.records, values, strict=True):
        fields = list(record.fields)
        old = [entry for entry in fields[_INFO].split(";") if entry and entry != "."]
        old = [entry for entry in old if entry.partition("=")[0] not in ids]
        fields[_INFO] = ";".join([*old, *(f"{key}={value}" for key, value in pairs)]) or "."
        rows.append("\t".join(fields))
    content = ("\n".join([*kept, *info_lines, *rows]) + "\n").encode()
    if path.suffix.lower() not in (".gz", ".bgz"):
        write_atomically(path, content)
        return
    _write_bgzip(path, content)


def _write_bgzip(path: Path, content: bytes) -> None:
    pysam = package("pysam")
    temporary, index = temporary_name(path), path.with_name(f"{path.name}.tbi")
    try:
        with pysam.BGZFile(str(temporary), "wb") as file:
            file.write(content)
        index.unlink(missing_ok=True)  # never leave an index of other bytes
        verbosity = pysam.set_verbosity(0)
        new_index = temporary.with_name(f"{temporary.name}.tbi")
        with suppress(OSError):  # unsorted records cannot have an index
            pysam.tabix_index(str(temporary), preset="vcf", force=True)
        pysam.set_verbosity(verbosity)
        temporary.replace(path)
        if is_file(new_index):
            new_index.replace(index)
    finally:
        temporary.unlink(missing_ok=True)
        temporary.with_name(f"{temporary.name}.tbi").unlink(missing_ok=True)
