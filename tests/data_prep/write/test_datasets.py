"""Regions, splits, several species, adding, merging and rebuilding, through the command."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caduceus.data.format import load_manifest
from caduceus.errors import UserError
from data_prep.write import sharding
from tests.data_prep.genomes import (
    SMALL,
    read_fasta,
    reverse_complement,
    shard,
    tar_samples,
    tree_digest,
    windows_of,
    write_fasta,
)


def test_rows_of_a_bed_file_are_the_windows(shards, tmp_path: Path) -> None:
    bed = tmp_path / "rows.bed"
    exact = ("--interval-mode", "exact", "--window", 800)
    bed.write_text("track name=x\n#c\nchr1\t10\t110\ttrain\n1\t50\t150\tvalid\nchr2\t0\t800\ttest\nchr9\t0\t5\ttrain\n")
    with pytest.raises(UserError, match=r"rows\.bed:6: the genome has no contig 'chr9', but .*--allow-unknown-contigs"):
        shards("--intervals", bed, *exact)
    allowed = ("--intervals", bed, "--allow-unknown-contigs")
    out, part = shards(*allowed, *exact, "--no-forbid-leakage")
    assert windows_of(out) == {("train", "chr1", 10, 110), ("valid", "chr1", 50, 150), ("test", "chr2", 0, 800)}
    assert part["report"]["leakage"] == {"valid": 60, "test": 0, "either": 60}
    assert part["report"]["notes"] == ["--intervals: 1 of 4 rows are on places that the genome does not hold: chr9"]
    assert part["report"]["dropped"]["outside_intervals"] == 4000 + 2500 - 140 - 800
    out, part = shards(*allowed, *exact)
    assert windows_of(out) == {("train", "chr1", 10, 50), ("valid", "chr1", 50, 150), ("test", "chr2", 0, 800)}
    assert part["report"]["leakage"]["either"] == 0
    out, _ = shards(*allowed)
    expected = {("train", "chr1", 10, 50), ("valid", "chr1", 50, 150)}
    assert windows_of(out) == expected | {("test", "chr2", 0, 500), ("test", "chr2", 500, 800)}


def test_extended_rows_leak_unless_told_not_to(shards, tmp_path: Path) -> None:
    bed = tmp_path / "rows.bed"
    bed.write_text("chr1\t0\t100\ttrain\nchr1\t100\t200\tvalid\nchr1\t3900\t4000\ttrain\n")
    out, part = shards("--intervals", bed, "--interval-mode", "extend")
    assert windows_of(out) == {("train", "chr1", 0, 500), ("valid", "chr1", 100, 600), ("train", "chr1", 3500, 4000)}
    assert part["report"]["leakage"] == {"valid": 400, "test": 0, "either": 400}
    out, part = shards("--intervals", bed, "--interval-mode", "extend", "--forbid-leakage")
    assert windows_of(out) == {("train", "chr1", 0, 100), ("valid", "chr1", 100, 600), ("train", "chr1", 3500, 4000)}
    assert part["report"]["leakage"]["either"] == 0


@pytest.mark.parametrize("mode", ["exact", "extend"])
def test_rows_longer_than_the_window_are_not_shortened_unasked(shards, tmp_path: Path, mode: str) -> None:
    bed = tmp_path / "rows.bed"
    bed.write_text("chr1\t0\t500\nchr1\t500\t1001\n")
    refusal = r"rows\.bed:2: has 501 bases, and no window is longer than --window 500; raise that, or cut rows"
    with pytest.raises(UserError, match=refusal):
        shards("--intervals", bed, "--interval-mode", mode)
    out, _ = shards("--intervals", bed, "--min-window", 1)
    assert windows_of(out) == {("train", "chr1", 0, 500), ("train", "chr1", 500, 1000), ("train", "chr1", 1000, 1001)}


def test_excluded_regions_are_in_no_window(shards, tmp_path: Path) -> None:
    bed = tmp_path / "black.bed"
    bed.write_text("chr1 1000 1100\nchr1 1050 1200\nchr2 2400 9999999\nchrM 1 2\nchr1 7 7\n")
    out, part = shards("--exclude-bed", bed)
    assert part["report"]["notes"] == [
        "--exclude-bed: 1 of 4 rows are on contigs that are not used: chrM",
        "--exclude-bed: 1 rows of black.bed are of zero length: lines 5",
        "--exclude-bed: 1 of 4 rows of black.bed reach beyond the end of chr2",
    ]
    kept = {"chr1": set(range(1000)) | set(range(1200, 4000)), "chr2": set(range(2400))}
    found: dict[str, set[int]] = {"chr1": set(), "chr2": set()}
    for _, contig, start, end in windows_of(out):
        found[contig] |= set(range(start, end))
    assert found == kept
    assert part["report"]["dropped"]["excluded"] == 300


def test_hashed_blocks_are_whole_and_deterministic(shards) -> None:
    options = ("--split-block", 200, "--valid-fraction", 0.4, "--test-fraction", 0.2)
    out, part = shards(*options)
    split_of: dict[tuple[str, int], set[str]] = {}
    for split, contig, start, end in windows_of(out):
        for block in range(start // 200, (end - 1) // 200 + 1):
            split_of.setdefault((contig, block), set()).add(split)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert set().union(*split_of.values()) == {"train", "valid", "test"}
    assert part["report"]["leakage"]["either"] == 0
    assert windows_of(shards(*options)[0]) == windows_of(out) != windows_of(shards(*options, "--seed", 1)[0])


def test_random_strands_store_each_window_once(shards) -> None:
    out, _ = shards("--strands", "random", "--window", 50)
    texts = [json.loads(files["json"]) for files in tar_samples(out).values()]
    assert len(texts) == len({(text["contig"], text["start"]) for text in texts}) == 130
    # 130 fair coins: fewer than 35 of either side has a probability below 1e-6
    assert 35 < sum(text["strand"] == "-" for text in texts) < 95
    assert windows_of(shards("--strands", "forward", "--window", 50)[0]) == windows_of(out)


def test_padded_tails_are_filled_with_n(shards) -> None:
    out, _ = shards("--tail", "pad", species="worm")
    padded = 0
    for files in tar_samples(out).values():
        text = json.loads(files["json"])
        assert len(files["seq"]) == 500
        filling = b"N" * (500 - (text["end"] - text["start"]))
        assert files["seq"].endswith(filling) if text["strand"] == "+" else files["seq"].startswith(filling)
        assert text.get("pad", 0) == len(filling)
        padded += bool(filling)
    assert padded == 2, "the last window of worm's chr2, on both strands"


YAML = """
weights: {weights}
defaults: {{window: 500, min_window: 20, min_acgt: 0}}
species:
  - {{name: fly, fasta: fly.fa, weight: 2, valid_contigs: [chr2]}}
  - {{name: worm, fasta: worm.fa, assembly: W1}}
  - {{name: weed, fasta: weed.fa, exclude: chr2, strands: forward}}
"""


def write_yaml(genomes: Path, weights: str = "given") -> Path:
    path = genomes / f"species{len(weights)}.yaml"
    path.write_text(YAML.format(weights=weights))
    return path


@pytest.mark.parametrize(("weights", "power"), [("given", 0), ("bases", 1), ("bases^0.5", 0.5)])
def test_weights_of_species(genomes: Path, tmp_path: Path, weights: str, power: float) -> None:
    shard("--genomes", write_yaml(genomes, weights), "--out", tmp_path / "out", "--workers", 1)
    found = {part["name"]: part["weight"] for part in load_manifest(tmp_path / "out")["species"]}
    train = {"fly": 4000, "worm": 3700, "weed": 6000}
    given_weight = {"fly": 2, "worm": 1, "weed": 1}
    assert found == pytest.approx({name: given_weight[name] * train[name] ** power for name in train}, rel=1e-12)


@pytest.mark.moderate
def test_added_or_merged_species_equal_one_run(genomes: Path, tmp_path: Path) -> None:
    together, added, merged = tmp_path / "together", tmp_path / "added", tmp_path / "merged"
    shard("--genomes", write_yaml(genomes), "--out", together, "--workers", 1)
    lines = YAML.format(weights="given").strip().splitlines()
    for number, entry in enumerate(lines[3:]):
        single = genomes / f"single{number}.yaml"
        single.write_text("\n".join([*lines[:3], entry]))
        shard("--genomes", single, "--out", added, "--workers", 1, *(["--add"] if number else []))
        shard("--genomes", single, "--out", tmp_path / f"node{number}", "--workers", 1)
    nodes = [tmp_path / f"node{number}" for number in (2, 0, 1)]
    shard("--merge", *nodes, "--out", merged)
    assert tree_digest(added) == tree_digest(merged) == tree_digest(together)
    assert "sound" in shard("--verify", merged)
    shard("--merge", *nodes, "--out", merged)  # a second time changes nothing
    assert tree_digest(merged) == tree_digest(together)


def test_another_weight_needs_no_other_shards(genomes: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    shard("--genomes", write_yaml(genomes), "--out", out, "--workers", 1)
    other = genomes / "other.yaml"
    other.write_text(YAML.format(weights="bases^0.5").replace("weight: 2", "weight: 3"))
    shard("--genomes", other, "--out", tmp_path / "anew", "--workers", 1)
    monkeypatch.setattr(sharding, "write_shard", None)
    shard("--genomes", other, "--out", out, "--workers", 1)
    assert tree_digest(out) == tree_digest(tmp_path / "anew")


MERGE_DAMAGE = {
    "short tar": lambda folder: os.truncate(folder / "train-000000.tar", 1000),
    "lost tar": lambda folder: (folder / "train-000000.tar").unlink(),
    "lost index": lambda folder: (folder / "train-000000.index.npz").unlink(),
}


@pytest.mark.parametrize("damage", MERGE_DAMAGE)
def test_damaged_datasets_are_not_merged(shards, tmp_path: Path, damage: str) -> None:
    (fly, _), (worm, _) = shards(), shards(species="worm")
    MERGE_DAMAGE[damage](worm / "worm")
    with pytest.raises(
        UserError, match=r"worm/train-000000\.tar: the tar or its index is missing or damaged.*then merge"
    ):
        shard("--merge", fly, worm, "--out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_fails_leaves_nothing_and_one_again_restores(shards, tmp_path: Path, monkeypatch) -> None:
    fly, _ = shards()
    merged = tmp_path / "merged"

    def fail(*_) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        patch.setattr(shutil, "copyfile", fail)
        with pytest.raises(UserError, match="cannot be written"):
            shard("--merge", fly, "--out", merged)
    assert not merged.exists()
    shard("--merge", fly, "--out", merged)
    (merged / "fly" / "train-000000.tar").unlink()
    shard("--merge", fly, "--out", merged)
    assert tree_digest(merged) == tree_digest(fly)


def test_merging_into_another_dataset_needs_add(shards) -> None:
    (fly, _), (worm, _) = shards(), shards(species="worm")
    with pytest.raises(UserError, match=r"holds another dataset \(species fly\).*--add"):
        shard("--merge", worm, "--out", fly)
    shard("--merge", worm, "--out", fly, "--add")
    assert [part["name"] for part in load_manifest(fly)["species"]] == ["fly", "worm"]


@pytest.mark.parametrize(
    ("task", "option"),
    [
        ("--merge", ("--window", 100)),
        ("--merge", ("--no-forbid-leakage",)),
        ("--verify", ("--seed", 0)),
        ("--verify", ("--out", "x")),
        ("--rebuild-index", ("--species", "fly")),
    ],
)
def test_options_without_effect_are_refused(shards, tmp_path: Path, task: str, option: tuple) -> None:
    out, _ = shards()
    target = ("--out", tmp_path / "merged") if task == "--merge" else ()
    name = option[0].replace("--no-", "--")
    with pytest.raises(UserError, match=f"^{name}: has no effect with {task}; leave it out$"):
        shard(task, out, *target, *option)
    assert not (tmp_path / "merged").exists()


def test_another_species_is_not_added_unasked(genomes: Path, shards) -> None:
    out, _ = shards()
    before = tree_digest(out)
    with pytest.raises(UserError, match=r"holds another dataset \(species fly\).*--add"):
        shard("--fasta", genomes / "worm.fa", "--species", "worm", "--out", out, *SMALL)
    with pytest.raises(UserError, match=r"holds sha256 '.*', but now it is"):
        other = genomes / "sub"
        other.mkdir()
        shutil.copy(genomes / "worm.fa", other / "fly.fa")
        shard("--fasta", other / "fly.fa", "--species", "fly", "--out", out, *SMALL)
    with pytest.raises(UserError, match="holds window 500, but now it is 400"):
        shard("--fasta", genomes / "fly.fa", "--species", "fly", "--out", out, *SMALL, "--window", 400)
    assert tree_digest(out) == before
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    shard("--fasta", genomes / "fly.fa", "--species", "fly", "--out", out, *SMALL)
    assert tree_digest(out) == before and times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.moderate
def test_indexes_are_rebuilt_from_tars(shards) -> None:
    out, _ = shards("--valid-contigs", "chr2", "--window", 300)
    before = tree_digest(out)
    for path in out.rglob("*.npz"):
        path.unlink()
    shard("--rebuild-index", out)
    assert tree_digest(out) == before
    for path in (*out.rglob("*.npz"), *out.rglob("*.json"), out / "report.html"):
        path.unlink()
    shard("--rebuild-index", out)
    after = tree_digest(out)
    same = {name for name in before.keys() & after.keys() if before[name] == after[name]}
    assert same >= {name for name in before if name.endswith(".tar")}
    part = load_manifest(out)["species"][0]
    assert set(part["splits"]) == {"train", "valid"} and part["plan"] == {"strands": "both"}
    assert "sound" in shard("--verify", out)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contigs=st.lists(st.text("ACGTacgtNnRYKMbdhv", min_size=1, max_size=400), min_size=1, max_size=4),
    window=st.integers(1, 150),
    strands=st.sampled_from(["both", "forward", "random"]),
    stride=st.none() | st.integers(1, 200),
    tail=st.sampled_from(["short", "inward", "drop", "pad"]),
    cut_gaps=st.sampled_from([0, 1, 5]),
    valid=st.booleans(),
)
def test_any_genome_is_reconstructed(tmp_path_factory, contigs, window, strands, stride, tail, cut_gaps, valid) -> None:
    folder = tmp_path_factory.mktemp("any")
    fasta = write_fasta(folder / "g.fa", {f"c{number}": bases for number, bases in enumerate(contigs)}, width=37)
    options = ["--window", window, "--min-window", 1, "--strands", strands, "--tail", tail, "--cut-gaps", cut_gaps]
    options += ["--min-acgt", 0, "--shard-bytes", "64KiB", "--workers", 1, *(["--stride", stride] if stride else [])]
    options += ["--valid-contigs", "c0"] if valid else []
    try:
        shard("--fasta", fasta, "--species", "any", "--out", folder / "out", *options)
    except UserError as error:
        assert "no window" in str(error) or "gives no window" in str(error)
        assert not (folder / "out").exists()
        return
    original = read_fasta(fasta.read_text())
    seen = {name: [None] * len(bases) for name, bases in original.items()}
    for files in tar_samples(folder / "out").values():
        text = json.loads(files["json"])
        bases = files["seq"].decode()
        bases = bases if text["strand"] == "+" else reverse_complement(bases)
        for place, base in enumerate(bases[: text["end"] - text["start"]], text["start"]):
            assert seen[text["contig"]][place] in (None, base)
            seen[text["contig"]][place] = base
        assert text["split"] == ("valid" if valid and text["contig"] == "c0" else "train")
    report = load_manifest(folder / "out")["species"][0]["report"]
    kept = 0
    for name, bases in original.items():
        for place, base in enumerate(bases):
            if seen[name][place] is not None:
                assert seen[name][place] == base
                kept += 1
            elif stride is None and tail in ("short", "inward", "pad"):
                assert base in "Nn" and cut_gaps, "only runs of N are left out"
    assert (report["kept"], report["bases"]) == (kept, sum(map(len, contigs)))
    assert report["kept"] + sum(report["dropped"].values()) == report["bases"]
    assert report["lower"] == sum(sum(map(str.islower, bases)) for bases in contigs)
    shard("--verify", folder / "out", "--workers", 1)


def test_genome_entry_brings_its_names_splits_and_blacklist(genomes: Path, tmp_path: Path) -> None:
    (tmp_path / "aliases.tsv").write_text("# ours\ttheirs\nchr1\tONE\nchr2\tTWO\n")
    (tmp_path / "black.bed").write_text("TWO\t100\t200\n")
    (tmp_path / "rows.bed").write_text("ONE\t0\t1000\ttrain\nTWO\t0\t1000\ttest\n")
    entry = tmp_path / "entry.yaml"
    entry.write_text(
        f"name: fly\nassembly: F1\nfasta: {genomes / 'fly.fa'}\ncontigs: [ONE, TWO]\nvalid_contigs: [TWO]\n"
        f"aliases: aliases.tsv\nblacklist: {tmp_path / 'black.bed'}\nintervals: {tmp_path / 'rows.bed'}\n"
    )
    shard("--genome", entry, "--out", tmp_path / "plain", *SMALL)
    (part,) = load_manifest(tmp_path / "plain")["species"]
    assert (part["name"], part["assembly"]) == ("fly", "F1")
    assert [contig["name"] for contig in part["contigs"]] == ["chr1", "chr2"]
    assert {window[:2] for window in windows_of(tmp_path / "plain")} == {("train", "chr1"), ("valid", "chr2")}
    shard("--genome", entry, "--out", tmp_path / "rows", *SMALL, "--intervals", "registry", "--exclude-bed", "registry")
    rows = {("train", "chr1", 0, 500), ("train", "chr1", 500, 1000)}
    rows |= {("test", "chr2", 0, 100), ("test", "chr2", 200, 700), ("test", "chr2", 700, 1000)}
    assert windows_of(tmp_path / "rows") == rows
    listed = tmp_path / "species.yaml"
    listed.write_text(f"species: [{{genome: {entry}, name: other, valid_contigs: [], exclude_bed: [black.bed]}}]")
    shard("--genomes", listed, "--out", tmp_path / "listed", *SMALL)
    found = windows_of(tmp_path / "listed")
    assert {split for split, *_ in found} == {"train"}
    assert all(end <= 100 or start >= 200 for _, contig, start, end in found if contig == "chr2")
