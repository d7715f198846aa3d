"""Real genomes, where they are at hand: every base accounted for by an independent reader."""

import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from caduceus.data.format import load_manifest
from caduceus.errors import UserError
from tests.data_prep.genomes import reverse_complement, shard, tree_digest

pytestmark = pytest.mark.slow


def read_gzipped(path: Path) -> dict[str, str]:
    """An independent reading of gzipped FASTA; bgzip is gzip in many members."""
    contigs: dict[str, list[str]] = {}
    with gzip.open(path, "rt") as file:
        for line in file:
            if line.startswith(">"):
                bases = contigs.setdefault(line[1:].split()[0], [])
            else:
                bases.append(line.strip())
    return {name: "".join(lines) for name, lines in contigs.items()}


def gap_mask(bases: str, shortest: int) -> np.ndarray:
    """Which bases lie in runs of N of at least this length, found by splitting the string."""
    mask = np.zeros(len(bases), dtype=bool)
    position = 0
    while (position := bases.find("N" * shortest, position)) >= 0:
        end = position
        while end < len(bases) and bases[end] in "Nn":
            end += 1
        mask[position:end] = True
        position = end
    return mask


SPECIES = """
defaults: {window: 131072}
species:
  - {name: human_chr20, fasta: human/20.fa.gz, assembly: GRCh37, test_contigs: ["20"]}
  - {name: human_chr1, fasta: human/chr1_first_3004950.fa.gz, assembly: hg19}
  - {name: thale_cress, fasta: arabidopsis/AthaTAIR10_chr1_GCF_000001735.4_TAIR10.1_genomic.fna.gz}
  - {name: yeast, fasta: yeast/sacCer3.fa.gz, valid_contigs: [chrXIV]}
  - {name: coli, fasta: ecoli/NC_008253.fna.gz}
"""


@pytest.fixture(scope="module")
def several(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    lines = [line.replace("fasta: ", f"fasta: {shared_data}/") for line in SPECIES.splitlines()]
    for path in sorted((shared_data / "drosophila").glob("D*_4_*.gz")):
        lines.append(f"  - {{name: {path.name.split('_')[0]}, fasta: {path}}}")
    (folder / "species.yaml").write_text("\n".join(lines))
    shard("--genomes", folder / "species.yaml", "--out", folder / "out", "--cache-dir", folder / "cache")
    return folder / "out"


def test_every_base_is_stored_on_both_strands_or_dropped_for_a_reason(several: Path, shared_data: Path) -> None:
    for part in load_manifest(several)["species"]:
        (path,) = shared_data.rglob(part["file"])
        contigs = read_gzipped(path)
        assert part["contigs"] == [{"name": n, "length": len(bases)} for n, bases in contigs.items() if n != "chrM"]
        count = {name: np.zeros(len(bases), dtype=np.int8) for name, bases in contigs.items()}
        for tar_path in sorted((several / part["name"]).glob("*.tar")):
            with tarfile.open(tar_path) as tar:
                for member in tar:
                    content = tar.extractfile(member).read().decode()
                    if member.name.endswith(".seq"):
                        stored = content
                        continue
                    text = json.loads(content)
                    bases = contigs[text["contig"]][text["start"] : text["end"]]
                    assert stored == (bases if text["strand"] == "+" else reverse_complement(bases)), member.name
                    count[text["contig"]][text["start"] : text["end"]] += 1
        report = part["report"]
        gaps = {name: gap_mask(bases, 10_000) for name, bases in contigs.items()}
        assert set(np.unique(np.concatenate(list(count.values())))) <= {0, 2}
        kept = sum(int((of_contig == 2).sum()) for of_contig in count.values())
        assert report["kept"] == kept
        assert report["bases"] == sum(map(len, contigs.values())) == kept + sum(report["dropped"].values())
        assert report["dropped"]["gap"] == sum(int(mask.sum()) for name, mask in gaps.items())
        assert not any((of_contig[gaps[name]] > 0).any() for name, of_contig in count.items())
        whole = "".join(contigs.values())
        assert report["n"] == whole.count("N") + whole.count("n")
        assert report["lower"] == sum(whole.count(base) for base in "acgtnryswkmbdhv")
        assert report["gc"] == sum(whole.count(base) for base in "GCgc")
    assert "sound" in shard("--verify", several)


def test_fasta_and_2bit_give_the_same_bytes(shared_data: Path, tmp_path: Path) -> None:
    for name, path in (("fasta", "yeast/sacCer3.fa.gz"), ("2bit", "twobit/sacCer3.2bit")):
        options = (
            "--species",
            "yeast",
            "--out",
            tmp_path / name,
            "--window",
            50_000,
            "--cache-dir",
            tmp_path / "cache",
        )
        shard("--fasta", shared_data / path, *options)
    digests = [
        {name: value for name, value in tree_digest(tmp_path / which).items() if name.endswith((".tar", ".npz"))}
        for which in ("fasta", "2bit")
    ]
    assert digests[0] == digests[1]


def test_blacklist_of_an_assembly(shared_data: Path, tmp_path: Path) -> None:
    bed = shared_data / "intervals" / "hg19-blacklist.v2.bed.gz"
    out = tmp_path / "out"
    options = ("--species", "human", "--out", out, "--exclude-bed", bed, "--cache-dir", tmp_path / "cache")
    with pytest.raises(UserError, match=r"hg19-blacklist\.v2\.bed\.gz:1: the genome has no contig 'chr\d+', but 20"):
        shard("--fasta", shared_data / "human" / "20.fa.gz", *options)
    options += ("--allow-unknown-contigs",)
    shard("--fasta", shared_data / "human" / "20.fa.gz", *options)
    length = load_manifest(out)["species"][0]["contigs"][0]["length"]
    mask = np.zeros(length, dtype=bool)
    for line in gzip.decompress(bed.read_bytes()).decode().splitlines():
        contig, start, end = line.split("\t")[:3]
        if contig == "chr20":
            mask[int(start) : int(end)] = True
    assert mask.any()
    for path in out.rglob("*.npz"):
        for row in np.load(path)["samples"]:
            assert not mask[row["start"] : row["start"] + row["length"]].any()
    assert load_manifest(out)["species"][0]["report"]["dropped"]["excluded"] == mask.sum()
