"""Files of variants as tools leave them and as mistakes leave them."""

import gzip
from pathlib import Path

import pytest

from caduceus.evaluate.alleles import Allele, prepare
from caduceus.evaluate.columns import read_columns
from caduceus.evaluate.model import Runner
from caduceus.evaluate.scores import ScoreOptions
from caduceus.evaluate.sequences import SequenceSource
from caduceus.evaluate.variant_inputs import VariantSource
from caduceus.evaluate.variants import score_file
from tests.evaluate.conftest import made, text_of
from tests.evaluate.test_variants import WINDOW


@pytest.mark.moderate
def test_every_odd_vcf_gives_a_result_or_one_line(shared_data: Path, tmp_path: Path, model_folder, evaluate, refused):
    model, chromosome = model_folder("ps"), shared_data / "human" / "20.fa.gz"
    for path in sorted((shared_data / "variants" / "odd_vcf").iterdir()):
        words = ["variants", "--model", model, "--genome", chromosome, "--window", 16, "--input", path]
        out = tmp_path / f"{path.stem}.vcf"
        lenient = ["--allow-unknown-contigs", "--ref-mismatch", "skip"]
        evaluate(*words, *lenient, "--out", out)
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            given = [line.split() for line in file if line.strip() and not line.startswith("#")]
        written = [line.split("\t") for line in out.read_text().splitlines() if not line.startswith("#")]
        assert [row[:7] for row in written] == [row[:7] for row in given], path.name
        if "vt_normalize" not in path.name:
            assert refused(*words, "--out", tmp_path / "refused.vcf").startswith(f"{path}:")
    assert not (tmp_path / "refused.vcf").exists()


@pytest.mark.moderate
def test_yeast_variants_fit_their_genome_and_swapped_ones_are_found(shared_data: Path, tmp_path: Path) -> None:
    yeast = shared_data / "yeast"
    file = VariantSource(yeast / "sacCer3_sample_variants.vcf.gz", yeast / "sacCer3.fa.gz").read()
    assert all(variant.note != "REF mismatch" for variant in prepare(file.alleles, file.genome))
    snvs = [a for a in file.alleles if len(a.ref) == len(a.alt) == 1][:1000]
    turned = [Allele(a.contig, a.pos, a.alt, a.ref, a.place) for a in snvs]
    assert sum(variant.swapped for variant in prepare(turned, file.genome, "swap")) == 1000


@pytest.mark.moderate
def test_mistakes_end_in_one_line(tmp_path: Path, genome: Path, model_folder, refused) -> None:
    text = text_of(genome)["chr1"]
    ref = text[99]
    wrong = "A" if ref != "A" else "C"
    table = "chrom,pos,ref,alt\n"
    files = {
        "in.csv": (f"{table}chr1,x,{ref},{wrong}\n", "in.csv:2: pos must be a whole number in plain digits, got 'x'"),
        "other.csv": (
            f"{table}chr1,100,{wrong},{ref}\n",
            "1 of 1 REF alleles differ from the genome; it may be for another",
        ),
        "contig.csv": (f"{table}chr7,100,A,C\n", "the genome has no contig 'chr7', but chr1, chr2"),
        "column.csv": ("chrom,pos,ref\nchr1,1,A\n", "no column 'alt' or 'alternate' or 'allele2' for ALT"),
        "empty.csv": (table, "the table has no row"),
        "nothing.csv": ("", "nothing.csv: holds no line"),
        "nothing.vcf": ("", "nothing.vcf: not a VCF"),
        "empty.vcf": ("#CHROM\tPOS\tID\tREF\tALT\n", "holds no variant"),
        "pos.vcf": ("#CHROM\tPOS\tID\tREF\tALT\nchr1\t1e3\t.\tA\tC\n", "pos.vcf:2: POS must be a whole number"),
        "short.vcf": ("#CHROM\tPOS\tID\tREF\tALT\nchr1\t1\n", "short.vcf:2: has 2 fields"),
        "in.fa": (">a\nACGT\n", "its ending does not say what it holds"),
        "places.bed": ("chr1\t1\t999\n", "ends beyond chr1 with 300 bases"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_text(content)
        kind = "--every-snv" if name.endswith(".bed") else "--input"
        words = ["variants", "--model", model_folder("ps"), kind, tmp_path / name, "--out", tmp_path / "out.tsv"]
        assert message in refused(*words, "--genome", genome), name
    (tmp_path / "good.csv").write_text(f"{table}chr1,100,{ref},{wrong}\n")
    good = ["variants", "--model", model_folder("ps"), "--input", tmp_path / "good.csv", "--genome", genome]
    for words, message in {
        ("--out", "out.vcf"): "is a VCF, but",
        ("--out", "out.xls"): "should end in one of",
        ("--scores", "best"): "--scores: choose from masked, unmasked, embedding",
        ("--ref-mismatch", "fix"): "--ref-mismatch: choose one of refuse, skip, swap",
        ("--window", "1"): "--window: must be at least 2",
        ("--genome", "none.fa"): "none.fa: no such file",
        ("--input", str(tmp_path)): f"{tmp_path}: is a folder; give a file of variants",
    }.items():
        assert message in refused(*good, "--out", tmp_path / "out.tsv", *words), words
    assert not list(tmp_path.glob("out*"))


def test_a_vcf_as_other_tools_leave_it_is_read_as_a_clean_one(tmp_path: Path, genome: Path) -> None:
    text, head = text_of(genome)["chr1"], "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    rows = [f"chr1\t{p}\t.\t{text[p - 1]}\t{'ACGT'.replace(text[p - 1], '')[0]}\t.\t.\t.\n" for p in (50, 60, 70)]
    clean = head + "".join(rows)
    (tmp_path / "clean.vcf").write_text(clean)
    lower = head + "".join(row.lower() for row in rows)
    odd = {
        "bom": "\ufeff" + clean,
        "crlf": clean.replace("\n", "\r\n"),
        "spaces": head + "".join(row.replace("\t", "  ") for row in rows),
        "lower": lower,
        "all": "\ufeff" + lower.replace("\n", "\r\n").replace("\t", " ", 3),
    }
    runner, options = Runner(made("ps")), ScoreOptions(window=WINDOW)
    score_file(runner, VariantSource(tmp_path / "clean.vcf", genome), tmp_path / "clean.tsv", options)
    expected = read_columns(tmp_path / "clean.tsv").values["llr"]
    for name, content in odd.items():
        (tmp_path / f"{name}.vcf").write_bytes(content.encode())
        score_file(runner, VariantSource(tmp_path / f"{name}.vcf", genome), tmp_path / f"{name}.tsv", options)
        assert read_columns(tmp_path / f"{name}.tsv").values["llr"] == expected, name


def test_u_is_t_in_windows_about_the_variants_of_a_vcf(tmp_path: Path) -> None:
    fasta, vcf = tmp_path / "genome.fa", tmp_path / "in.vcf"
    fasta.write_text(">chr1\nGATTACA\n")
    vcf.write_text("#CHROM\tPOS\tID\tREF\tALT\nchr1\t3\t.\tu\tC\nchr1\t5\t.\tA\tU\n")
    items = SequenceSource(vcf, genome=fasta, window=4).items()
    assert [item.read().tobytes() for item in items] == [b"GATT", b"GACT", b"TTAC", b"TTTC"]
