"""Windows around the genes of an annotation."""

import gzip
from pathlib import Path

import pytest

from caduceus.data.format import load_manifest
from caduceus.errors import UserError
from tests.data_prep.genomes import windows_of

GTF = """\
#!genome-build test
chr1\tx\tgene\t1001\t1200\t.\t+\t.\tgene_id "a";
chr1\tx\texon\t1001\t1100\t.\t+\t.\tgene_id "a";
chr1\tx\tgene\t1290\t1300\t.\t-\t.\tgene_id "b";
chr1\tx\tgene\t3951\t4000\t.\t-\t.\tgene_id "c";
chr2\tx\tgene\t11\t20\t.\t-\t.\tgene_id "d";
"""


def test_windows_are_those_of_genes_and_their_flanks(shards, tmp_path: Path) -> None:
    gtf = tmp_path / "genes.gtf.gz"
    gtf.write_bytes(gzip.compress(GTF.encode()))
    out, part = shards("--around", gtf, "--flank", 60, "--valid-contigs", "chr2")
    near = {("train", "chr1", 940, 1360), ("train", "chr1", 3890, 4000), ("valid", "chr2", 0, 80)}
    assert windows_of(out) == near
    assert part["report"]["notes"] == ["--around: 4 genes of genes.gtf.gz"]
    assert part["report"]["dropped"]["outside_intervals"] == 6500 - 420 - 110 - 80
    assert part["plan"]["flank"] == 60 and part["plan"]["around"]["file"] == "genes.gtf.gz"
    out, _ = shards("--around", gtf, "--flank", 0)
    assert windows_of(out) == {("train", "chr1", 1000, 1200), ("train", "chr1", 3950, 4000)}, "others are too short"


def test_an_annotation_without_genes_gives_its_features(shards, tmp_path: Path) -> None:
    gff = tmp_path / "transcripts.gff3"
    gff.write_text(
        "##gff-version 3\nchr1\tx\tregion\t1\t4000\t.\t+\t.\tID=r\nchr1\tx\tmRNA\t101\t200\t.\t+\t.\tID=m\n"
        "chr1\tx\tCDS\t111\t150\t.\t+\t0\tParent=m\n##FASTA\n>chr1\nACGT\n"
    )
    out, part = shards("--around", gff, "--flank", 100)
    assert windows_of(out) == {("train", "chr1", 0, 300)}
    assert part["report"]["notes"] == ["--around: 2 features (none of them a gene) of transcripts.gff3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chr1\tx\tgene\t5\t9\n", r"genes\.gtf:1: not a line of GTF or GFF3"),
        ("chr1\tx\tgene\t0\t9\t.\t+\t.\tx\n", r"genes\.gtf:1: start 0 and end 9 are impossible; starts count from 1"),
        ("chr1\tx\tgene\t9\t4001\t.\t+\t.\tx\n", r"genes\.gtf:1: ends at 4,001, beyond chr1 with 4,000 bases"),
        ("chr7\tx\tgene\t5\t9\t.\t+\t.\tx\n", r"genes\.gtf:1: the genome has no contig 'chr7'"),
        ("#nothing\n", r"--around: .*genes\.gtf names no gene"),
    ],
)
def test_what_is_no_annotation_of_the_genome_is_refused(shards, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "genes.gtf").write_text(text)
    with pytest.raises(UserError, match=message):
        shards("--around", tmp_path / "genes.gtf")


def test_regions_come_from_one_file(shards, tmp_path: Path) -> None:
    (tmp_path / "genes.gtf").write_text(GTF)
    with pytest.raises(UserError, match="--around: --intervals decides which regions are used"):
        shards("--around", tmp_path / "genes.gtf", "--intervals", tmp_path / "genes.gtf")
    with pytest.raises(UserError, match=r"--flank: .*give it by --around"):
        shards("--flank", 60)
    out, _ = shards()
    assert "around" not in load_manifest(out)["species"][0]["plan"]
