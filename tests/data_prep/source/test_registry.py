"""The registry's files are complete and consistent, and a wrong file is refused in one line."""

import re
from pathlib import Path

import pytest

from caduceus.errors import UserError
from data_prep.source.registry import REGISTRY, registry_names, resolve_genome

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
NAMES = ["ce11", "dm6", "hg19", "hg38", "hs1", "mm10", "mm39", "sacCer3", "tair10"]


def test_names():
    assert registry_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_entry(name):
    genome = resolve_genome(name)
    assert genome.name == name
    assert genome.organism and genome.assembly and genome.urls and genome.contigs
    assert all(url.startswith("https://") for url in genome.urls)
    assert genome.md5 is None or re.fullmatch("[0-9a-f]{32}", genome.md5)
    assert set(genome.valid_contigs + genome.test_contigs) < set(genome.contigs)
    assert genome.valid_contigs
    groups = genome.alias_groups()
    aliases = [alias for group in groups for alias in group]
    assert len(aliases) == len(set(aliases))
    assert len({len(group) for group in groups}) == 1
    named = set(aliases)
    assert named >= set(genome.contigs)


def test_include_pattern_takes_every_name_of_the_main_contigs():
    pattern = re.compile(resolve_genome("hg38").include_pattern())
    for name in ("chr1", "1", "NC_000001.11", "chrX", "X", "NC_000023.11", "chrY", "NC_000024.10"):
        assert pattern.fullmatch(name)
    for name in ("chr1_KI270706v1_random", "chrUn_GL000195v1", "chrM", "MT", "NC_012920.1", "chrEBV", "NC_000001x11"):
        assert not pattern.fullmatch(name)


@pytest.mark.parametrize("name", ["hg19", "hg38", "mm10"])
def test_contigs_are_those_of_the_assembly(name):
    sizes = SHARED / "intervals" / f"{name}.chrom.sizes"
    if not sizes.is_file():
        pytest.skip("needs the contig tables of ../shared/data")
    known = {line.split("\t")[0] for line in sizes.read_text().splitlines()}
    main = {contig for contig in known if re.fullmatch(r"chr(\d+|X|Y)", contig)}
    assert set(resolve_genome(name).contigs) == main


GOOD = "name: x\nfasta: x.fa\n"
WRONG = {
    "name: x\n": "'x' needs one of the keys fasta, urls",
    "fasta: x.fa\n": "a genome without a name",
    "name: a b\nfasta: x.fa\n": "name 'a b' may hold letters",
    GOOD + "colour: red\n": "unknown key 'colour'; known are name, organism",
    GOOD + "include: '('\n": "key 'include' is not a regular expression",
    GOOD + "contigs: {a: 1}\n": "key 'contigs' cannot have the value {'a': 1}",
    GOOD + "valid_contigs: [c]\ntest_contigs: [c]\n": "'x' has c in valid_contigs and in test_contigs",
    "- a\n- b\n": "must hold the keys of a genome",
    "a: [\n": "cannot be read",
    "species: []\n": "give it to --genomes",
    "name: x\nfasta: ${oc.env:CADUCEUS_NO_SUCH_VARIABLE}/x.fa\n": "CADUCEUS_NO_SUCH_VARIABLE",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        resolve_genome(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert WRONG[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_name_and_missing_file(tmp_path):
    with pytest.raises(UserError, match="'hg99' is not a genome of the registry; known are ce11, dm6, hg19"):
        resolve_genome("hg99")
    with pytest.raises(UserError, match="no such file"):
        resolve_genome(str(tmp_path / "none.yaml"))


def test_own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nfasta: genomes/a.fa\naliases: a.tsv\ncontigs: [1, 2]\nvalid_contigs: 2\n")
    (tmp_path / "a.tsv").write_text("# ucsc\trefseq\nchr1\tNC_1.1\n\nchr2\t\n")
    genome = resolve_genome(str(path))
    assert genome.fasta == tmp_path / "genomes" / "a.fa"
    assert genome.contigs == ("1", "2")
    assert genome.valid_contigs == ("2",)
    assert genome.alias_groups() == [("chr1", "NC_1.1"), ("chr2",)]
    path.write_text("name: mine\nfasta: ${oc.env:SCRATCH}/a.fa\n")
    assert resolve_genome(str(path)).fasta == Path("/scratch/a.fa")


def test_registry_folder_is_the_repository_s():
    assert REGISTRY.parts[-2:] == ("configs", "genome")
