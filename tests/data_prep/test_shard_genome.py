"""The command from end to end: what stands in the tars is the genome."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from caduceus.data.format import ShardIndex, index_path, load_manifest
from tests.data_prep.genomes import (
    random_bases,
    read_fasta,
    reverse_complement,
    shard,
    tar_samples,
    tree_digest,
    write_fasta,
)

OPTIONS = ("--window", 700, "--min-window", 50, "--cut-gaps", 100, "--shard-bytes", "64KiB", "--min-acgt", 0)


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    contigs = {f"chr{n}": random_bases(rng, length) for n, length in ((1, 20_000), (2, 9_999), (3, 700), (4, 130))}
    contigs["chr1"] = (
        contigs["chr1"][:3000] + "N" * 250 + contigs["chr1"][3250:9000] + "n" * 40 + contigs["chr1"][9040:]
    )
    contigs["NC_1.2"] = random_bases(rng, 1500)
    contigs["NC_1_2"] = random_bases(rng, 1500)
    return write_fasta(tmp_path_factory.mktemp("genome") / "g.fa", contigs)


@pytest.fixture(scope="module")
def dataset(genome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    shard(
        "--fasta", genome, "--species", "toy-1", "--assembly", "A1", "--out", out, *OPTIONS,
        "--valid-contigs", "chr2", "--test-contigs", "chr3", "--workers", 1,
    )  # fmt: skip
    return out


def test_every_sample_is_the_genomes_slice(genome: Path, dataset: Path) -> None:
    contigs = read_fasta(genome.read_text())
    samples = tar_samples(dataset)
    kept = {name: np.zeros(len(bases), dtype=int) for name, bases in contigs.items()}
    for key, files in samples.items():
        text = json.loads(files["json"])
        assert (text["species"], text["assembly"]) == ("toy-1", "A1")
        assert text["split"] == {"chr2": "valid", "chr3": "test"}.get(text["contig"], "train")
        bases = contigs[text["contig"]][text["start"] : text["end"]]
        assert files["seq"].decode() == (bases if text["strand"] == "+" else reverse_complement(bases)), key
        assert 50 <= len(bases) <= 700
        kept[text["contig"]][text["start"] : text["end"]] += 1
    for name, count in kept.items():
        gap = np.zeros_like(count, dtype=bool)
        if name == "chr1":
            gap[3000:3250] = True
        assert (count[~gap] == 2).all(), "every base is in one window, on both strands"
        assert (count[gap] == 0).all()


def test_index_describes_the_tar(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    (part,) = manifest["species"]
    for split in part["splits"].values():
        for row in split["shards"]:
            tar = dataset / "toy-1" / row["name"]
            assert row["bytes"] == tar.stat().st_size <= 65536
            index = ShardIndex.load(index_path(tar))
            content = tar.read_bytes()
            assert len(index.samples) == row["samples"]
            runs = {number: [] for number in range(len(index.samples))}
            for run in index.runs.tolist():
                runs[run[0]].append(run[1:])
            for number, sample in enumerate(index.samples):
                bases = content[sample["offset"] : int(sample["offset"]) + int(sample["length"])].decode()
                assert sample["acgt"] == sum(bases.upper().count(base) for base in "ACGT")
                assert sample["lower"] == sum(base.islower() for base in bases)
                assert [(s, n) for s, n in map(tuple, runs[number])] == long_runs(bases)


def long_runs(bases: str) -> list[tuple[int, int]]:
    """Runs of 16 or more other codes than ACGT, by reading letter after letter."""
    runs, start = [], None
    for position, base in enumerate(bases.upper() + "A"):
        if base not in "ACGT":
            start = position if start is None else start
        elif start is not None:
            if position - start >= 16:
                runs.append((start, position - start))
            start = None
    return runs


def test_stock_webdataset_reads_the_tars(dataset: Path) -> None:
    urls = [str(path) for path in sorted(dataset.glob("*/*.tar"))]
    read = {
        sample["__key__"]: sample["seq"]
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    }
    assert read == {key: files["seq"] for key, files in tar_samples(dataset).items()}


def test_strands_of_a_window_are_neighbours(dataset: Path) -> None:
    for path in dataset.glob("*/*.npz"):
        samples = ShardIndex.load(path).samples
        assert (samples["strand"][0::2] == 0).all() and (samples["strand"][1::2] == 1).all()
        for field in ("contig", "start", "length"):
            assert (samples[field][0::2] == samples[field][1::2]).all()


@pytest.mark.slow
def test_same_bytes_with_any_number_of_workers_and_from_any_directory(genome: Path, dataset: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere" / genome.name
    moved.parent.mkdir()
    moved.write_bytes(genome.read_bytes())
    arguments = ("--species", "toy-1", "--assembly", "A1", *OPTIONS, "--valid-contigs", "2", "--test-contigs", "chr3")
    shard("--fasta", moved, "--out", tmp_path / "out", *arguments, "--workers", 3)
    ours, theirs = tree_digest(tmp_path / "out"), tree_digest(dataset)
    assert {k: v for k, v in ours.items() if k.endswith((".tar", ".npz"))} == {
        k: v for k, v in theirs.items() if k.endswith((".tar", ".npz"))
    }


@pytest.mark.moderate
def test_verify_finds_a_sound_dataset_sound(dataset: Path) -> None:
    assert "sound" in shard("--verify", dataset)
