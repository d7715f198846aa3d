"""Names of contigs: kinds that are left out, patterns, and tables of aliases."""

from pathlib import Path

import pytest

from caduceus.errors import UserError
from data_prep.plan.aliases import AliasTable, read_aliases
from data_prep.plan.contigs import kind_of, select_contigs
from data_prep.plan.options import PlanOptions

KINDS = {
    None: "chr1 1 chrX Y chrW Z 2L chr2R chrIV XVI I NC_000001.11 NC_003070.9 NT_033779.5 chr10 LG3 A01 C1 chr2A scaf"
    " chr2a Chr5 CM000663.2 MTA mt-like",
    "mitochondrion": "chrM MT M chrMT Mt ChrM NC_012920.1 mitochondrion NC_001224.1 chrMito Mito mitochondrion_genome",
    "plastid": "chrC Pt ChrC chloroplast NC_000932.1",
    "EBV": "chrEBV NC_007605.1 NC_007605",
    "decoy": "hs37d5 hs38d1 chrUn_KN707606v1_decoy",
    "alt": "chr1_KI270762v1_alt chr6_apd_hap1 chr1_MU273333v1_fix HLA-A*01:01:01:01 HSCHR1_CTG1_UNLOCALIZED",
    "random": "chr1_KI270706v1_random chr4_GL000008v2_random chr1random",
    "unplaced": "chrUn_KI270302v1 chrUn Un GL000192.1 KI270728.1 chrU chrUextra NW_009646194.1 NT_167214.1 scaffold_12"
    " chrUn_GL000220v1",
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names.split()])
def test_kinds_by_name(kind: str | None, name: str) -> None:
    assert kind_of(name) == kind


def test_kind_by_header() -> None:
    assert kind_of("NC_999999.1", "NC_999999.1 Some beast mitochondrion, complete genome") == "mitochondrion"
    assert kind_of("NC_888888.1", "NC_888888.1 Some weed chloroplast, complete genome") == "plastid"
    assert kind_of("NC_000001.1", "NC_000001.1 Some beast chromosome 1, whole genome shotgun sequence") is None


def choose(contigs: dict[str, int], aliases: AliasTable | None = None, **options: object):
    return select_contigs(contigs, {}, PlanOptions(**options), aliases or AliasTable())


def test_what_is_left_out_is_told_with_its_bases() -> None:
    found = choose({"chr1": 100, "chrM": 16, "chr1_x_alt": 5, "chr2_y_alt": 6})
    assert found.used == {"chr1": 100}
    assert found.left_out == {"mitochondrion": {"chrM": 16}, "alt": {"chr1_x_alt": 5, "chr2_y_alt": 6}}


def test_include_replaces_the_default_rules_and_exclude_wins() -> None:
    contigs = {"chr1": 1, "chr2": 2, "chrM": 3}
    assert choose(contigs, include="chr[1M]").used == {"chr1": 1, "chrM": 3}
    assert choose(contigs, include="chr.*", exclude="chr2").used == {"chr1": 1, "chrM": 3}
    assert choose(contigs, exclude="chr2").used == {"chr1": 1}
    with pytest.raises(UserError, match="none of the 3 contigs"):
        choose(contigs, include="hr1")


def test_an_assembly_of_scaffolds_alone_is_used() -> None:
    assert choose({"NW_1.1": 5, "scaffold_2": 6, "MT": 1}).used == {"NW_1.1": 5, "scaffold_2": 6}
    assert choose({"NW_1.1": 5, "chr1": 6}).used == {"chr1": 6}


def test_names_with_and_without_chr_mean_the_same() -> None:
    found = choose({"1": 9, "chrX": 8, "MT": 1}, include=".*")
    names = {"chr1": "1", "1": "1", "X": "chrX", "chrX": "chrX", "chrM": "MT", "M": "MT", "chr2": None}
    assert {name: found.find(name) for name in names} == names


def test_alias_table_translates_names_and_patterns(tmp_path: Path) -> None:
    path = tmp_path / "aliases.tsv"
    path.write_text("# ucsc\tensembl\trefseq\nchr1\t1\tNC_000001.11\nchrM\tMT\tNC_012920.1\n")
    found = choose({"NC_000001.11": 9, "NC_012920.1": 1}, read_aliases(path), include="chr1")
    assert found.used == {"NC_000001.11": 9}
    assert [found.find(name) for name in ("chr1", "1", "NC_000001.11")] == ["NC_000001.11"] * 3
    path.write_text("chr1\t1\nchrom1\t1\n")
    with pytest.raises(UserError, match=r"aliases.tsv:2: '1' stands in two rows"):
        read_aliases(path)


REPORT = """# Assembly name:  Test1
# Sequence-Name\tSequence-Role\tAssigned-Molecule\tAssigned-Molecule-Location/Type\tGenBank-Accn\tRelationship\t\
RefSeq-Accn\tAssembly-Unit\tSequence-Length\tUCSC-style-name
1\tassembled-molecule\t1\tChromosome\tCM1.1\t=\tNC_1.1\tPrimary Assembly\t100\tchr1
HSX\tunlocalized-scaffold\t1\tChromosome\tKX1.1\t=\tNT_1.1\tPrimary Assembly\t50\tna
HSU\tunplaced-scaffold\tna\tna\tKU1.1\t=\tna\tPrimary Assembly\t40\tchrUn_KU1
P1\tfix-patch\t1\tChromosome\tKP1.1\t=\tNW_1.1\tPATCHES\t30\tna
MT\tassembled-molecule\tMT\tMitochondrion\tJ1.1\t=\tNC_9.1\tnon-nuclear\t16\tchrM
"""


def test_assembly_report_gives_names_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_text(REPORT.replace("\n", "\r\n"))
    found = choose({"NC_1.1": 1, "KX1.1": 2, "KU1.1": 3, "NW_1.1": 4, "NC_9.1": 5}, read_aliases(path))
    assert found.used == {"NC_1.1": 1}
    assert found.find("chr1") == found.find("1") == found.find("CM1.1") == "NC_1.1"
    kinds = {kind: list(contigs) for kind, contigs in found.left_out.items()}
    assert kinds == {"random": ["KX1.1"], "unplaced": ["KU1.1"], "alt": ["NW_1.1"], "mitochondrion": ["NC_9.1"]}
    assert found.find("na") is None


@pytest.mark.parametrize("assembly", ["hg38", "hg19"])
def test_default_rules_keep_the_chromosomes_of_real_assemblies(assembly: str, shared_data: Path) -> None:
    text = (shared_data / "intervals" / f"{assembly}.chrom.sizes").read_text()
    contigs = {name: int(length) for name, length in map(str.split, filter(None, text.splitlines()))}
    assert set(choose(contigs).used) == {f"chr{name}" for name in [*range(1, 23), "X", "Y"]}
