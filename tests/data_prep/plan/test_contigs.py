"""Names of contigs: kinds that are left out, patterns, and tables of aliases."""

import gzip
import runpy
from pathlib import Path

import pytest

from caduceus.errors import UserError
from data_prep.plan.aliases import AliasTable, read_aliases
from data_prep.plan.contigs import refuse_small_share, select_contigs
from data_prep.plan.options import PlanOptions
from tests.conftest import REPOSITORY
from tests.data_prep.genome_files import twobit
from tests.data_prep.genomes import dataset_of, shard, write_fasta

KINDS = {
    None: "chr1 1 chrX Y chrW Z 2L chr2R chrIV XVI I NC_000001.11 NC_003070.9 NT_033779.5 chr10 LG3 A01 C1 chr2A scaf"
    " chr2a Chr5 CM000663.2 MTA mt-like MT123456.1 mt_7 Chr01 SUPER_1 OX123456.1",
    "mitochondrion": "chrM MT M chrMT Mt ChrM NC_012920.1 mitochondrion NC_001224.1 chrMito Mito mitochondrion_genome",
    "plastid": "chrC Pt ChrC chloroplast NC_000932.1 Pltd",
    "EBV": "chrEBV NC_007605.1 NC_007605",
    "decoy": "hs37d5 hs38d1 chrUn_KN707606v1_decoy",
    "alt": "chr1_KI270762v1_alt chr6_apd_hap1 chr1_MU273333v1_fix HLA-A*01:01:01:01 HSCHR1_CTG1_UNLOCALIZED",
    "random": "chr1_KI270706v1_random chr4_GL000008v2_random chr1random",
    "unplaced": "chrUn_KI270302v1 chrUn Un GL000192.1 KI270728.1 chrU chrUextra NW_009646194.1 NT_167214.1 scaffold_12"
    " chrUn_GL000220v1",
}
MITOCHONDRION, PLASTID, LONG = 16_569, 154_478, 30_000_000


def choose(lengths: dict[str, int], aliases: AliasTable | None = None, titles: dict[str, str] | None = None, **options):
    return select_contigs(lengths, titles or {}, PlanOptions(**options), aliases or AliasTable())


def kind_beside_a_chromosome(name: str, length: int = MITOCHONDRION, title: str = "") -> str | None:
    found = choose({"the rest": LONG, name: length}, titles={name: f"{name} {title}"})
    return next((kind for kind, contigs in found.left_out.items() if name in contigs), None)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names.split()])
def test_kinds_by_name(kind: str | None, name: str) -> None:
    assert kind_beside_a_chromosome(name) == kind


TITLES = {
    "Some beast mitochondrion, complete genome": "mitochondrion",
    "Some beast isolate 7 mitochondrion": "mitochondrion",
    "Some beast mitochondrial DNA, complete genome, strain: X": "mitochondrion",
    "Some beast genome assembly, organelle: mitochondrion": "mitochondrion",
    "Some beast [location=mitochondrion] [completeness=complete]": "mitochondrion",
    "Some weed chloroplast, complete genome": "plastid",
    "Some weed genome assembly, organelle: plastid:chloroplast": "plastid",
    "Toxoplasma gondii apicoplast, complete genome": "plastid",
    "Some beast chromosome 1, whole genome shotgun sequence": None,
    "similar to mitochondrial DNA": None,
    "plastid-like sequence": None,
    "Some beast scaffold 7, contains nuclear mitochondrial DNA": None,
    "mitochondrion-derived insert": None,
    "genes for mitochondrial proteins": None,
    "chloroplast-related region of chromosome 3": None,
    "possible contamination by chloroplast DNA": None,
}


@pytest.mark.parametrize("title", TITLES)
def test_organelles_by_title(title: str) -> None:
    assert kind_beside_a_chromosome("NC_999999.1", title=title) == TITLES[title]


def test_organelles_are_told_by_several_signs() -> None:
    lettered = {name: 5_000_000 + place for place, name in enumerate("ABCDEF")}
    assert choose(lettered).used == lettered, "a letter among letters is a chromosome, however short"
    assert choose({f"chr{letter}": 100_000 for letter in "KLMN"}).left_out == {}
    assert kind_beside_a_chromosome("C", PLASTID) == "plastid"
    assert kind_beside_a_chromosome("C", LONG // 3) is None, "a plastid is far shorter than a chromosome"
    assert kind_beside_a_chromosome("MT", 11_700_000) == "mitochondrion", "as long as that of Corchorus"
    assert kind_beside_a_chromosome("MT", 40_000_000) is None, "longer than any mitochondrion"
    titles = {"C": "C Some weed chloroplast, complete genome"}
    assert choose({"B": LONG, "C": PLASTID}, titles=titles).left_out == {"plastid": {"C": PLASTID}}


def left_out(lengths: dict[str, int], titles: dict[str, str] | None = None) -> list[str]:
    return [name for contigs in choose(lengths, titles=titles).left_out.values() for name in contigs]


def test_an_organelle_of_one_letter_is_told_by_its_length_beside_short_chromosomes() -> None:
    linkage_groups = {f"LG{number}": 400_000 - 50_000 * number for number in range(5)}
    assert left_out(linkage_groups | {"ChrC": PLASTID, "ChrM": 366_924}) == ["ChrC", "ChrM"]
    assert left_out(linkage_groups | {"C": 95_000, "M": 366_924}) == ["C", "M"], (
        "95,000: below a quarter of the longest"
    )
    assert left_out(linkage_groups | {"C": 230_000}) == [], "no usual length, and as long as the others"
    assert left_out({"C": PLASTID}) == [], "the whole genome"
    assert left_out({"C": PLASTID, "1": 120_000}) == [], "most of the genome"


@pytest.mark.parametrize("length", [1_000, 10_999])
@pytest.mark.parametrize("stem", ["contig{}", "A{}"])
def test_what_is_shorter_than_any_plastid_is_none(stem: str, length: int) -> None:
    others = {stem.format(letter): LONG for letter in "ABCDEF"}
    assert left_out(others | {"C": length}) == []
    assert left_out(others | {"C": 11_400}) == ["C"]
    assert left_out(others | {"M": 5_000}) == [] and left_out(others | {"M": 5_970}) == ["M"]


@pytest.mark.parametrize("names", ["A C E", "a C F", "chrA C chrG", "A B C", "chrD chrC", "D c"])
def test_a_letter_is_a_chromosome_where_other_chromosomes_have_letters(names: str) -> None:
    lengths = {name: PLASTID if name.lower() in ("c", "chrc") else LONG for name in names.split()}
    assert left_out(lengths) == []


@pytest.mark.parametrize("names", ["1 2 C", "X Y C", "chrI chrII chrV chrX C", "U Z W C", "A01 C01 C", "A 1 C"])
def test_letters_of_sexes_and_numbers_make_no_series(names: str) -> None:
    assert left_out({name: PLASTID if name == "C" else LONG for name in names.split()})[-1:] == ["C"]


def test_a_title_makes_a_letter_a_chromosome() -> None:
    lengths, title = {"1": LONG, "C": PLASTID}, "C Some fungus strain 7 chromosome C, complete sequence"
    assert left_out(lengths, {"C": title}) == []
    assert left_out(lengths, {"C": "C dna:chromosome chromosome:TAIR10:C:1:154478:1 REF"}) == ["C"], (
        "of any, in Ensembl"
    )


SCAFFOLDS = {
    "RefSeq, one mitochondrion": {**{f"NW_0{number}.1": 50_000 for number in range(40)}, "NC_012345.1": 16_500},
    "names with the word": {**{f"Mu_scaffold_{number}": 90_000 for number in range(20)}, "ctg1": 10_000},
    "Un_ and MT_": {**{f"Un_{number}": 70_000 for number in range(9)}, "MT_1": 16_000},
    "one contig among scaffolds": {**{f"scaffold_{number}": 80_000 for number in range(9)}, "contig_1": 9_000},
    "GenBank, one chromosome assembled": {**{f"JH{700000 + n}.1": 400_000 for n in range(9)}, "CM001234.1": 900_000},
    "scaffolds beside a named plastid": {**{f"scaffold{n:05}": 10_000 for n in range(50)}, "LG1": 2_000},
}


@pytest.mark.parametrize("case", SCAFFOLDS)
def test_an_assembly_of_scaffolds_is_told_by_bases(case: str) -> None:
    assert choose(SCAFFOLDS[case]).used == SCAFFOLDS[case]


def test_scaffolds_beside_chromosomes_are_left_out() -> None:
    assert choose({"NW_1.1": 5, "scaffold_2": 6, "MT": 1}).used == {"NW_1.1": 5, "scaffold_2": 6}
    assert choose({"NW_1.1": 5, "chr1": 6}).used == {"chr1": 6}
    assert choose({"NW_1.1": 6, "chr1": 5}, contigs="primary").used == {"chr1": 5}
    assert choose({"NW_1.1": 5, "chr1": 6, "chrM": 1}, contigs="all").left_out == {}


def test_what_is_left_out_is_told_with_its_bases() -> None:
    found = choose({"chr1": 100, "chrM": 16, "chr1_x_alt": 5, "chr2_y_alt": 6})
    assert found.used == {"chr1": 100}
    assert found.left_out == {"mitochondrion": {"chrM": 16}, "alt": {"chr1_x_alt": 5, "chr2_y_alt": 6}}


MOSTLY_OTHER = {"chr1": 400, "chr1_a_alt": 300, "chr2_b_alt": 250, "chrM": 60}


def test_a_default_that_drops_most_bases_is_refused_with_a_table(capsys: pytest.CaptureFixture) -> None:
    found = choose(MOSTLY_OTHER)
    advice = r"only 39\.6% of the bases would be kept \(1 of 4 contigs\); --contigs all .* primary .* --include"
    with pytest.raises(UserError, match=advice):
        refuse_small_share(found, PlanOptions())
    table = capsys.readouterr().err.splitlines()
    assert table[0].split()[:4] == ["left", "out", "contigs", "bases"]
    assert [line.split()[:3] for line in table[1:]] == [["alt", "2", "550"], ["mitochondrion", "1", "60"]]
    assert "chr1_a_alt, chr2_b_alt" in table[1]
    for way_on in ({"contigs": "primary"}, {"contigs": "all"}, {"include": "chr1"}):
        refuse_small_share(choose(MOSTLY_OTHER, **way_on), PlanOptions(**way_on))
    refuse_small_share(choose(MOSTLY_OTHER, exclude=".*_alt"), PlanOptions(exclude=".*_alt"))
    refuse_small_share(choose({"chr1": 50, "chr1_alt": 50}), PlanOptions())


def test_nothing_but_organelles_is_refused_with_a_table(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"none of the 1 contigs .* 1 mitochondrion; --contigs all uses every one"):
        choose({"chrM": 16_569})
    assert "mitochondrion" in capsys.readouterr().err
    assert choose({"chrM": 16_569}, contigs="all").used == {"chrM": 16_569}


def test_include_replaces_the_default_rules_and_exclude_wins() -> None:
    contigs = {"chr1": 1, "chr2": 2, "chrM": 3}
    assert choose(contigs, include="chr[1M]").used == {"chr1": 1, "chrM": 3}
    assert choose(contigs, include="chr.*", exclude="chr2").used == {"chr1": 1, "chrM": 3}
    assert choose(contigs, exclude="chr2").used == {"chr1": 1}
    assert choose(contigs, contigs="all", exclude="chr2").used == {"chr1": 1, "chrM": 3}
    with pytest.raises(UserError, match="none of the 3 contigs"):
        choose(contigs, include="hr1")
    with pytest.raises(UserError, match="--include decides which contigs are used; leave one of the two out"):
        choose(contigs, include="chr1", contigs="all")


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
    with pytest.raises(UserError, match=r"aliases.tsv:2: '1' occurs in two rows"):
        read_aliases(path)


WRITTEN = {
    "plain": b"chr1\t1\tNC_1\nchrM\tMT\tNC_9\n",
    "byte order mark": b"\xef\xbb\xbfchr1\t1\tNC_1\r\nchrM\tMT\tNC_9\r\n",
    "byte order mark before a heading": b"\xef\xbb\xbf# ucsc\tensembl\trefseq\nchr1\t1\tNC_1\nchrM\tMT\tNC_9\n",
    "trailing blanks": b"chr1\t1\tNC_1 \nchrM\tMT \tNC_9\t\n",
    "tabs and blanks": b"chr1\t1 NC_1\nchrM MT\tNC_9\n",
    "missing names": b"chr1\t1\tNC_1\tna\nchrM\tMT\tNC_9\tNA\nna\t.\t\n",
    "headings without a mark": b"ucsc\tensembl\trefseq\nchr1\t1\tNC_1\nchrM\tMT\tNC_9\n",
    "gzip": gzip.compress(b"chr1\t1\tNC_1\nchrM\tMT\tNC_9\n"),
    "UTF-16, as spreadsheets write text": "chr1\t1\tNC_1\r\nchrM\tMT\tNC_9\r\n".encode("utf-16"),
    "old Mac": b"chr1\t1\tNC_1\rchrM\tMT\tNC_9\r",
    "UCSC's database": b"1\tchr1\tensembl\nNC_1\tchr1\trefseq\nMT\tchrM\tensembl,ncbi\nNC_9\tchrM\trefseq\n",
    "UCSC's database with headings": b"# alias\tchrom\tsource\n1\tchr1\tx\nNC_1\tchr1\ty\nMT\tchrM\tz\nNC_9\tchrM\tz\n",
    "UCSC's first form": b"# sequenceName\talias names\tUCSC database: x1\nchr1\t1\tNC_1\nchrM\tMT\tNC_9\n",
    "NCBI datasets": b"Sequence name\tGenBank seq accession\tRefSeq seq accession\tRole\tUCSC style name\n"
    b"1\tCM1\tNC_1\tassembled-molecule\tchr1\nMT\tJ1\tNC_9\tassembled-molecule\tchrM\n",
}


@pytest.mark.parametrize("case", WRITTEN)
def test_tables_of_names_are_read_as_tools_write_them(tmp_path: Path, case: str) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(WRITTEN[case])
    found = choose({"NC_1": 900, "NC_9": 16}, read_aliases(path), contigs="all")
    names = {"chr1": "NC_1", "1": "NC_1", "chrM": "NC_9", "MT": "NC_9", "na": None, "refseq": None, "ucsc": None}
    assert {name: found.find(name) for name in names} == names


REPORT = """# Assembly name:  Test1
# Sequence-Name\tSequence-Role\tAssigned-Molecule\tAssigned-Molecule-Location/Type\tGenBank-Accn\tRelationship\t\
RefSeq-Accn\tAssembly-Unit\tSequence-Length\tUCSC-style-name
1\tassembled-molecule\t1\tChromosome\tCM1.1\t=\tNC_1.1\tPrimary Assembly\t100\tchr1
HSX\tunlocalized-scaffold\t1\tChromosome\tKX1.1\t=\tNT_1.1\tPrimary Assembly\t50\tna
HSU\tunplaced-scaffold\tna\tna\tKU1.1\t=\tna\tPrimary Assembly\t40\tchrUn_KU1
P1\tfix-patch\t1\tChromosome\tKP1.1\t=\tNW_1.1\tPATCHES\t30\tna
MT\tassembled-molecule\tMT\tMitochondrion\tJ1.1\t=\tNC_9.1\tnon-nuclear\t16\tchrM
"""


@pytest.mark.parametrize("row", ["chr1,NC_1.1", "chr1;NC_1.1", "chr1", "chr1\tna"])
def test_a_table_without_a_second_name_is_refused(tmp_path: Path, row: str) -> None:
    path = tmp_path / "names"
    path.write_text(f"# names\n{row}\n{row.replace('1', '2')}\n")
    with pytest.raises(UserError, match=r"names:2: no row of the table has two names, as 'chr1.*'; separate"):
        read_aliases(path)
    path.write_text(f"{row}\nchr3\tNC_3.1\n")
    assert read_aliases(path).groups["chr3"] == ("chr3", "NC_3.1")


def test_assembly_report_gives_names_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_bytes(b"\xef\xbb\xbf" + REPORT.replace("\n", "\r\n").encode())
    found = choose({"NC_1.1": 100, "KX1.1": 2, "KU1.1": 3, "NW_1.1": 4, "NC_9.1": 5}, read_aliases(path))
    assert found.used == {"NC_1.1": 100}
    assert found.find("chr1") == found.find("1") == found.find("CM1.1") == "NC_1.1"
    kinds = {kind: list(contigs) for kind, contigs in found.left_out.items()}
    assert kinds == {"random": ["KX1.1"], "unplaced": ["KU1.1"], "alt": ["NW_1.1"], "mitochondrion": ["NC_9.1"]}
    assert found.find("na") is None


def test_a_row_of_names_that_the_genome_lacks_is_refused_unless_allowed(tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "g.fa", {"NC_1": "ACGT" * 500, "NC_2": "ACGT" * 300})
    (tmp_path / "names.tsv").write_text("chr1\tNC_1\nchr2\tNC_2\nchr3\tNC_3\n")
    arguments = ("--fasta", fasta, "--species", "s", "--aliases", tmp_path / "names.tsv", "--workers", 1)
    with pytest.raises(UserError, match=r"names\.tsv:3: the genome has no contig chr3 or NC_3.*--allow-unknown"):
        shard(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    printed = shard(*arguments, "--out", tmp_path / "out", "--allow-unknown-contigs")
    assert "--aliases: 1 of 3 rows are about contigs that the genome lacks" in printed
    assert "allow_unknown_contigs" not in dataset_of(tmp_path / "out")["plan"]


def test_what_is_left_out_stands_on_the_screen_in_the_manifest_and_in_the_report(tmp_path: Path, rng) -> None:
    lengths = {f"NW_{number}.1": 5_000 for number in range(6)} | {"chrM": 300, "NC_1.1_alt": 1_200}
    contigs = {name: "".join(rng.choice(list("ACGTacgt"), length)) for name, length in lengths.items()}
    path = tmp_path / "g.2bit"
    path.write_bytes(twobit(contigs, "<"))
    printed = shard("--fasta", path, "--species", "beast", "--out", tmp_path / "out", "--workers", 1)
    assert "beast:\nleft out       contigs  bases  share" in printed
    assert any(line.split()[:5] == ["mitochondrion", "1", "300", "1.0", "%"] for line in printed.splitlines())
    part = dataset_of(tmp_path / "out")
    assert [contig["name"] for contig in part["contigs"]] == [f"NW_{number}.1" for number in range(6)]
    assert part["plan"]["contigs"] == "auto"
    left_out = part["report"]["left_out"]
    assert left_out["alt"]["bases"] == 1_200 and left_out["mitochondrion"]["names"] == ["chrM"]
    html = (tmp_path / "out" / "report.html").read_text()
    for group in left_out.values():
        assert group["why"] in html and f"{group['bases']:,}" in html
    shard("--fasta", path, "--species", "beast", "--out", tmp_path / "all", "--workers", 1, "--contigs", "all")
    assert dataset_of(tmp_path / "all")["report"]["left_out"] == {}


@pytest.mark.parametrize("assembly", ["hg38", "hg19"])
def test_default_rules_keep_the_chromosomes_of_real_assemblies(assembly: str, shared_data: Path) -> None:
    text = (shared_data / "intervals" / f"{assembly}.chrom.sizes").read_text()
    contigs = {name: int(length) for name, length in map(str.split, filter(None, text.splitlines()))}
    assert set(choose(contigs).used) == {f"chr{name}" for name in [*range(1, 23), "X", "Y"]}


def test_made_assemblies_of_every_style_keep_their_chromosomes_or_are_refused() -> None:
    program = runpy.run_path(str(REPOSITORY / "benchmarks" / "contig_names.py"))
    rows = {row[0]: row for row in map(program["row_of"], program["made_assemblies"]())}
    assert len(rows) == 23
    refused = rows.pop("mostly alternative versions")
    assert refused[3] == "refused"
    shares = {name: float(row[3].removesuffix(" %")) for name, row in rows.items()}
    assert all(share > 91 for share in shares.values()), shares
    whole = [name for name in rows if "scaffolds" in name or "alone" in name or "one c" in name.lower()]
    assert all(shares[name] > 99.7 for name in whole) and len(whole) == 6


def test_real_assemblies_are_rows_of_the_table(shared_data: Path, tmp_path: Path) -> None:
    program = runpy.run_path(str(REPOSITORY / "benchmarks" / "contig_names.py"))
    (sizes,) = program["assemblies_of"](shared_data / "intervals" / "mm10.chrom.sizes", tmp_path)
    assert program["row_of"](sizes)[1:4] == ["67", "2,730,888,073", "99.80 %"]
