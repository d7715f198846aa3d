"""Files of several species: what one of them says over the defaults."""

from pathlib import Path

import pytest

from caduceus.data.format import load_manifest
from caduceus.errors import UserError
from tests.data_prep.genomes import shard

BLOCKS = "split_block: 200, valid_fraction: 0.4, test_fraction: 0.2"
OVERRIDES = {
    # defaults, a species' own options -> the splits that the species has
    ("blocks", BLOCKS, "split_block: null"): {"train"},
    ("no fractions", BLOCKS, "valid_fraction: 0, test_fraction: 0"): {"train"},
    ("one fraction", BLOCKS, "test_fraction: 0"): {"train", "valid"},
    ("one fraction by null", BLOCKS, "valid_fraction: null"): {"train", "test"},
    ("contigs instead", BLOCKS, "valid_contigs: [chr2]"): {"train", "valid"},
    ("blocks instead", "valid_contigs: [chr2]", "split_block: 200, test_fraction: 0.4"): {"train", "test"},
    ("no contigs", "valid_contigs: [chr2]", "valid_contigs: null"): {"train"},
    ("no list of contigs", "valid_contigs: [chr2]", "valid_contigs: []"): {"train"},
    ("rows", "intervals: rows.bed, interval_mode: exact", "intervals: null"): {"train"},
    ("pattern", "include: chr2", "contigs: all"): {"train"},
}


@pytest.mark.parametrize("case", OVERRIDES, ids=lambda case: case[0])
def test_a_species_switches_off_what_the_defaults_say(genomes: Path, tmp_path: Path, case: tuple) -> None:
    _, defaults, own = case
    (tmp_path / "rows.bed").write_text("chr1\t0\t400\tvalid\n")
    path = tmp_path / "species.yaml"
    path.write_text(
        f"defaults: {{window: 500, min_window: 20, min_acgt: 0, {defaults}}}\n"
        f"species: [{{name: fly, fasta: {genomes / 'fly.fa'}, {own}}}, {{name: worm, fasta: {genomes / 'worm.fa'}}}]\n"
    )
    shard("--genomes", path, "--out", tmp_path / "out", "--workers", 1)
    fly, worm = load_manifest(tmp_path / "out")["species"]
    assert set(fly["splits"]) == OVERRIDES[case]
    assert set(worm["splits"]) != {"train"} or "include" in defaults
    if case[0] == "pattern":
        assert [contig["name"] for contig in fly["contigs"]] == ["chr1", "chr2", "chrM"]


def test_defaults_that_contradict_themselves_are_still_refused(genomes: Path, tmp_path: Path) -> None:
    path = tmp_path / "species.yaml"
    path.write_text(f"defaults: {{split_block: 2000}}\nspecies: [{{name: fly, fasta: {genomes / 'fly.fa'}}}]\n")
    with pytest.raises(UserError, match="--split-block: give --valid-fraction or --test-fraction"):
        shard("--genomes", path, "--out", tmp_path / "out", "--workers", 1)
    path.write_text(
        f"defaults: {{contigs: [chr1]}}\nspecies: [{{name: fly, fasta: {genomes / 'fly.fa'}}}]\n",
    )
    with pytest.raises(UserError, match=r"--contigs: must be auto or all or primary, got \['chr1'\]; 'include' takes"):
        shard("--genomes", path, "--out", tmp_path / "out", "--workers", 1)
