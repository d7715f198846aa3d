"""Near copies of held-out sequence are found, on both strands, across species, and nothing else is."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caduceus.data.format import load_manifest
from caduceus.errors import UserError
from data_prep.plan import homology
from data_prep.plan.homology import LEVELS, STRETCH, K, copies, near_stretches, sampled_kmers
from tests.data_prep.genomes import random_bases, reverse_complement, shard, tar_samples, tree_digest, write_fasta


def as_bases(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def mutated(bases: str, rate: float, rng: np.random.Generator) -> str:
    letters = np.array(list(bases))
    changed = rng.random(len(letters)) < rate
    letters[changed] = rng.choice(list("ACGT"), int(changed.sum()))
    return "".join(letters)


def shared(text: str, other: str) -> float:
    """Share of the k-mers of a text, of either strand, that the other has: by sets of words."""
    words = {min(word, reverse_complement(word)) for word in (other[n : n + K] for n in range(len(other) - K + 1))}
    mine = [text[n : n + K] for n in range(len(text) - K + 1)]
    return sum(min(word, reverse_complement(word)) in words for word in mine) / max(len(mine), 1)


@given(st.text("ACGTNacgt", min_size=0, max_size=200), st.integers(0, 99))
def test_kmers_are_those_of_both_strands(text: str, seed: int) -> None:
    before = homology._SAMPLED
    homology._SAMPLED = np.uint64(2**64 - 1)
    try:
        hashes, starts = sampled_kmers(as_bases(text))
        mirrored, of_mirror = sampled_kmers(as_bases(reverse_complement(text)))
    finally:
        homology._SAMPLED = before
    words = [text[n : n + K] for n in range(max(0, len(text) - K + 1))]
    expected = [n for n, word in enumerate(words) if set(word) <= set("ACGT")]
    assert starts.tolist() == expected
    assert (hashes[::-1] == mirrored).all() and (len(text) - K - of_mirror[::-1] == starts).all()
    same = {min(words[n], reverse_complement(words[n])) for n in expected}
    assert len(set(hashes.tolist())) == len(same)


def test_kmers_are_sampled_alike_wherever_a_block_begins(rng: np.random.Generator, monkeypatch) -> None:
    bases = as_bases(random_bases(rng, 5000).upper())
    whole = sampled_kmers(bases)
    assert 5000 / 16 * 0.7 < len(whole[0]) < 5000 / 16 * 1.3
    monkeypatch.setattr(homology, "_BLOCK", 700)
    for one, other in zip(whole, sampled_kmers(bases), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("strand", ["+", "-"])
@pytest.mark.parametrize(("rate", "found"), [(0.0, True), (0.02, True), (0.2, False)])
def test_a_stretch_is_a_copy_by_its_share_of_kmers(strand: str, rate: float, found: bool) -> None:
    rng = np.random.default_rng(4)
    held_out = random_bases(rng, 20_000).upper()
    copy = mutated(held_out[3000:11_000], rate, rng)
    copy = reverse_complement(copy) if strand == "-" else copy
    train = random_bases(rng, 10_000).upper() + copy + random_bases(rng, 9_000).upper()
    assert (shared(copy, held_out) >= 0.5) == found
    near = copies(near_stretches(as_bases(train), np.unique(sampled_kmers(as_bases(held_out))[0]), 0.1), 0.5)
    if not found:
        assert len(near) == 0
        return
    ((start, end),) = near.tolist()
    assert start <= 10_000 + STRETCH // 2 and end >= 18_000 - STRETCH // 2
    assert start >= 10_000 - STRETCH // 2 and end <= 18_000 + STRETCH // 2
    masked = train[:10_000] + copy.lower() + train[18_000:]
    assert len(near_stretches(as_bases(masked), np.unique(sampled_kmers(as_bases(held_out))[0]), 0.1)) == 0, (
        "soft-masked"
    )


@pytest.fixture
def relatives(tmp_path: Path) -> Path:
    """Two species: chr2 of the one is held out, and chr1 of both hold near copies of it."""
    rng = np.random.default_rng(3)
    first, second, held_out = (random_bases(rng, length).upper() for length in (30_000, 30_000, 40_000))
    of_first = first[:15_000] + mutated(held_out[:10_000], 0.01, rng) + first[15_000:]
    of_second = second + reverse_complement(mutated(held_out[20_000:30_000], 0.02, rng))
    write_fasta(tmp_path / "a.fa", {"chr1": of_first, "chr2": held_out})
    write_fasta(tmp_path / "b.fa", {"chr1": of_second})
    (tmp_path / "both.yaml").write_text(
        "species:\n- {name: a, fasta: a.fa, valid_contigs: [chr2]}\n- {name: b, fasta: b.fa}\n"
    )
    return tmp_path


@pytest.mark.moderate
def test_train_has_no_near_copy_of_what_any_species_holds_out(relatives: Path) -> None:
    out, plain = relatives / "out", relatives / "plain"
    options = ("--window", 40_000, "--genomes", relatives / "both.yaml", "--workers", 2)
    shard(*options, "--out", plain)
    shard(*options, "--out", out, "--homology", 0.5)
    kept = {part["name"]: part["report"] for part in load_manifest(out)["species"]}
    whole = {part["name"]: part["report"] for part in load_manifest(plain)["species"]}
    assert kept["a"]["splits"]["valid"] == whole["a"]["splits"]["valid"]
    texts = [json.loads(files["json"]) for files in tar_samples(out).values()]
    for name, copied in (("a", (15_000, 25_000)), ("b", (30_000, 40_000))):
        lost = whole[name]["splits"]["train"]["bases"] - kept[name]["splits"]["train"]["bases"]
        assert 10_000 - STRETCH <= lost <= 10_000 + STRETCH
        assert f"--homology: {lost:,} bp of train are near copies of valid or test" in kept[name]["notes"][-1]
        at = kept[name]["near_copies"]
        assert list(at) == list(map(str, LEVELS)) and at["0.5"] == lost
        assert at["0.1"] >= at["0.25"] >= at["0.5"] >= at["0.75"] > at["0.9"] == 0, "with 1 and 2 % of bases changed"
        train = [text for text in texts if (text["species"], text["split"]) == (name, "train")]
        inner = range(copied[0] + STRETCH // 2, copied[1] - STRETCH // 2)
        assert train and not any(text["start"] < inner.stop and inner.start < text["end"] for text in train)
    page = (out / "report.html").read_text()
    assert "near to valid or test" in page and f"<td>{kept['b']['near_copies']['0.25']:,}</td>" in page
    assert "near to valid or test" not in (plain / "report.html").read_text()
    before = tree_digest(out)
    shard(*options, "--out", out, "--homology", 0.5)
    assert tree_digest(out) == before
    with pytest.raises(UserError, match="another"):
        shard(*options, "--out", out, "--homology", 0.6)
    with pytest.raises(UserError, match="--homology: with --add"):
        shard(*options, "--out", out, "--homology", 0.5, "--add")
    shard("--fasta", relatives / "b.fa", "--species", "c", "--out", relatives / "c", "--workers", 1)
    for words in (
        ["--merge", out, relatives / "c", "--out", relatives / "new"],
        ["--merge", relatives / "c", "--out", out, "--add"],
        ["--fasta", relatives / "b.fa", "--species", "c", "--out", out, "--add"],
    ):
        with pytest.raises(UserError, match=r"species a: --homology looked .* of its command, of which c is none"):
            shard(*words)
    shard("--merge", out, "--out", relatives / "again")
    assert load_manifest(relatives / "again") == load_manifest(out)
    with pytest.raises(UserError, match="--homology: nothing is held out"):
        shard("--fasta", relatives / "b.fa", "--species", "b", "--out", relatives / "new", "--homology", 0.5)
    with pytest.raises(UserError, match="--homology: must be above 0 and at most 1"):
        shard(*options, "--out", relatives / "new", "--homology", 1.5)


@pytest.mark.moderate
def test_a_share_below_the_levels_of_the_report_is_left_out_as_well(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    held_out, train = random_bases(rng, 20_000).upper(), random_bases(rng, 30_000).upper()
    write_fasta(tmp_path / "a.fa", {"chr1": train[:15_000] + held_out[5000:5250] + train[15_000:], "chr2": held_out})
    options = ("--window", 40_000, "--fasta", tmp_path / "a.fa", "--species", "a", "--valid-contigs", "chr2")
    shard(*options, "--out", tmp_path / "out", "--homology", 0.02)
    (part,) = load_manifest(tmp_path / "out")["species"]
    assert part["report"]["near_copies"]["0.1"] == 0, "7 of 256 and of 236 sampled k-mers"
    assert STRETCH <= 30_250 - part["report"]["splits"]["train"]["bases"] <= 2 * STRETCH


@pytest.mark.moderate
def test_no_window_of_train_has_a_near_stretch_wherever_it_begins(tmp_path: Path) -> None:
    """What one copy leaves out lets windows begin elsewhere, and hold another that no window held before."""
    rng = np.random.default_rng(8)
    held_out, train = random_bases(rng, 20_000).upper(), random_bases(rng, 75_000).upper()
    pieces = [train[:10_000], held_out[:6000], train[10_000:36_000], held_out[10_000:18_000], train[36_000:]]
    write_fasta(tmp_path / "a.fa", {"chr1": "".join(pieces)[:59_000], "chr2": held_out, "chr3": train[45_000:]})
    options = ("--window", 20_000, "--tail", "drop", "--fasta", tmp_path / "a.fa", "--species", "a")
    shard(*options, "--valid-contigs", "chr2", "--out", tmp_path / "out", "--homology", 0.5)
    kmers = np.unique(sampled_kmers(as_bases(held_out))[0])
    samples = [(json.loads(files["json"]), files["seq"]) for files in tar_samples(tmp_path / "out").values()]
    windows = {text["contig"]: bases for text, bases in samples if (text["split"], text["strand"]) == ("train", "+")}
    assert list(windows) == ["chr1", "chr3"]
    for bases in windows.values():
        assert len(near_stretches(np.frombuffer(bases, np.uint8), kmers, 0.5)) == 0
