"""Tables of regions that have no effect, or only some: told, or refused."""

import json
from pathlib import Path

import pytest

from caduceus.data.format import load_manifest
from caduceus.errors import UserError
from tests.data_prep.genomes import SMALL, shard, tree_digest


def test_tables_of_comments_only_exclude_nothing_and_say_so(shards, tmp_path: Path) -> None:
    bed = tmp_path / "none.bed"
    bed.write_text("# nothing\ntrack\n\n")
    _, part = shards("--exclude-bed", bed)
    assert part["report"]["notes"] == ["--exclude-bed: none.bed holds no interval: nothing is excluded by it"]
    with pytest.raises(UserError, match=r"none\.bed holds no interval, so there is nothing to use"):
        shards("--intervals", bed)


def test_rows_without_effect_are_refused_unless_allowed(shards, tmp_path: Path) -> None:
    bed = tmp_path / "other.bed"
    bed.write_text("chr1\t10\t20\nchr7\t10\t20\nchr2\t2500\t2600\n")
    with pytest.raises(UserError, match=r"other\.bed:2: the genome has no contig 'chr7', but chr1, chr2; --aliases"):
        shards("--exclude-bed", bed)
    bed.write_text("chr1\t10\t20\nchr2\t2500\t2600\n")
    with pytest.raises(UserError, match=r"other\.bed:2: starts at 2,500, beyond the end of chr2 with 2,500 bases"):
        shards("--exclude-bed", bed)
    _, part = shards("--exclude-bed", bed, "--allow-unknown-contigs")
    assert part["report"]["dropped"]["excluded"] == 10
    assert part["report"]["notes"] == ["--exclude-bed: 1 of 2 rows are on places that the genome does not hold: chr2"]


def test_a_permission_that_is_given_later_needs_no_other_shards(genomes: Path, shards) -> None:
    out, _ = shards()
    before = tree_digest(out)
    shard("--fasta", genomes / "fly.fa", "--species", "fly", "--out", out, *SMALL, "--allow-unknown-contigs")
    assert tree_digest(out) == before


def test_a_dataset_of_an_earlier_version_is_the_same_dataset(genomes: Path, shards) -> None:
    """Its manifest does not name the options that came later."""
    out, part = shards()
    del part["plan"]["contigs"]
    (out / "fly" / "species.json").write_text(json.dumps(part))
    shard("--fasta", genomes / "fly.fa", "--species", "fly", "--out", out, *SMALL)
    assert "contigs" not in load_manifest(out)["species"][0]["plan"]
    with pytest.raises(UserError, match="holds contigs 'auto', but now it is 'all'"):
        shard("--fasta", genomes / "fly.fa", "--species", "fly", "--out", out, *SMALL, "--contigs", "all")
