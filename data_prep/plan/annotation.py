"""Reads the genes of an annotation (GTF or GFF3) as rows of a BED file."""

from pathlib import Path

from caduceus.bed import Bed, BedRow
from caduceus.errors import UserError
from caduceus.tables import read_lines, refuse_line, whole_number

_COLUMNS = 8
"""Columns of a feature before its attributes."""
_OF_NO_GENE = {"region", "chromosome", "contig", "scaffold", "supercontig", "sequence_feature"}


def read_genes(path: Path) -> tuple[Bed, str]:
    """The features `gene` of an annotation; where it names none, the features of any kind, but for whole contigs.

    Returns them and what they are: genes, or features. Plain or gzip. Starts count from 0 in the result, as in BED. A
    line that is no feature is a `UserError` that names it.
    """
    genes, others = [], []
    for number, line in read_lines(path):
        if line.startswith("##FASTA") or line.startswith(">"):  # a GFF3 file may end with the bases
            break
        if line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) < _COLUMNS:
            refuse_line(
                path, number, f"not a line of GTF or GFF3: {line[:60]!r}; a feature has nine columns, separated by tabs"
            )
        contig, feature = fields[0], fields[2]
        start, end = (whole_number(fields[column], path, number, name) for column, name in ((3, "start"), (4, "end")))
        if not 1 <= start <= end:
            refuse_line(
                path, number, f"start {start} and end {end} are impossible; starts count from 1, ends are included"
            )
        row = BedRow(number, contig, start - 1, end, None)
        if feature == "gene":
            genes.append(row)
        elif not genes and feature not in _OF_NO_GENE:
            others.append(row)
    rows = genes or others
    if not rows:
        raise UserError(f"--around: {path} names no gene, so there is nothing to use; leave the option out")
    return Bed(path, rows, []), "genes" if genes else "features (none of them a gene)"
