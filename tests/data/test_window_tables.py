"""Datasets with tables of their windows give the samples that those without give, and open few files."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.config import Config
from caduceus.data import ShardedGenome, build_loader, genome
from caduceus.data.format import load_manifest
from caduceus.data.loader import build_validation
from caduceus.data.split_sources import open_sources
from caduceus.errors import UserError
from caduceus.files import dump_json, sha256_of
from data_prep.shard_genome import main as shard_genome
from tests.conftest import REPOSITORY
from tests.data.shard_fixture import random_bases

OPTIONS = ["--window", "2000", "--min-window", "300", "--min-acgt", "0", "--shard-bytes", "64KiB", "--workers", "1"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three species in many small shards, one of them padded, with runs of N and a validation split."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(3)
    for species, options in (("ant", []), ("bee", ["--strands", "random"]), ("cat", ["--tail", "pad"])):
        gapped = random_bases(rng, 60_000) + "N" * 600 + random_bases(rng, 50_500)
        (folder / f"{species}.fa").write_text(f">one\n{gapped}\n>two\n{random_bases(rng, 35_300)}\n")
        source = ["--fasta", str(folder / f"{species}.fa"), "--species", species, "--out", str(folder / "out")]
        assert not shard_genome([*source, *OPTIONS, *options, "--valid-contigs", "two", "--add"])
    return folder / "out"


@pytest.fixture
def former(dataset: Path, tmp_path: Path) -> Path:
    """The same dataset in the form of version 1, without tables."""
    return without_tables(Path(shutil.copytree(dataset, tmp_path / "former")))


def without_tables(directory: Path) -> Path:
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest.pop("tables") and manifest["version"] == 2
    (directory / "manifest.json").write_bytes(dump_json({**manifest, "version": 1}))
    for path in directory.glob("*.npy"):
        path.unlink()
    return directory


def config_of(*paths: Path, weights: tuple[float, ...] = (1.0, 1.0)) -> Config:
    config = Config()
    entries = [{"path": str(path), "weight": weight} for path, weight in zip(paths, weights, strict=False)]
    config.data.path = entries if len(paths) > 1 else str(paths[0])
    config.data.seq_len, config.data.workers = 512, 0
    config.train.global_batch = config.train.micro_batch = 8
    return config


@pytest.mark.moderate
def test_windows_and_runs_are_those_of_the_indexes(dataset: Path, former: Path) -> None:
    mapped, indexed = ShardedGenome(dataset), ShardedGenome(former)
    assert mapped.fingerprint == indexed.fingerprint and len(list(dataset.glob("*.npy"))) == 4
    for species in mapped.species:
        for split in ("train", "valid", "test"):
            a, b = mapped.table(species, split), indexed.table(species, split)
            assert np.array_equal(a.windows, b.windows) and np.array_equal(a.runs, b.runs)
            assert (a.bases, a.contigs, len(a.shards)) == (b.bases, b.contigs, len(b.shards))
            assert [shard.sha256 for shard in a.shards] == [shard.sha256 for shard in b.shards]
        assert np.array_equal(mapped.read(species, "one", 2_100, 3_900), indexed.read(species, "one", 2_100, 3_900))


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside another"])
def test_samples_are_the_same_bit_for_bit_in_the_same_order(
    dataset: Path, former: Path, one_more: Path, others: bool
) -> None:
    more = [one_more] if others else []
    loaders = [build_loader(config_of(path, *more)) for path in (dataset, former)]
    assert loaders[0].fingerprint == loaders[1].fingerprint
    mapped = open_sources(config_of(dataset, *more).data, "train").crops.windows
    assert isinstance(mapped, np.memmap) != others
    for number, (a, b) in enumerate(zip(*loaders, strict=False)):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
        if number == 20:
            break
    assert [loaders[0].describe(g) for g in range(60)] == [loaders[1].describe(g) for g in range(60)]
    a, b = (list(build_validation(config_of(path, *more))) for path in (dataset, former))
    assert len(a) == len(b) > 0
    assert all(x[0] == y[0] and torch.equal(x[1].input_ids, y[1].input_ids) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def one_more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("more")
    (folder / "g.fa").write_text(f">one\n{random_bases(np.random.default_rng(4), 120_000)}\n")
    source = ["--fasta", str(folder / "g.fa"), "--species", "dog", "--out", str(folder / "out")]
    assert not shard_genome([*source, *OPTIONS])
    return folder / "out"


COUNT = """
import sys
from caduceus.config import DataConfig
from caduceus.data.split_sources import open_sources
opens = 0
def count(event, arguments):
    global opens
    opens += event == "open"
data = DataConfig(path=sys.argv[1], seq_len=512)
sys.addaudithook(count)
open_sources(data, "train")
print(opens)
"""


@pytest.mark.moderate
def test_opening_takes_as_many_opens_whatever_the_number_of_shards(dataset: Path, former: Path, one_more: Path) -> None:
    opens = {}
    for path in (dataset, one_more, former):
        command = [sys.executable, "-c", COUNT, str(path)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
        shards = sum(len(part["splits"]["train"]["shards"]) for part in load_manifest(path)["species"])
        opens[path] = (int(shown), shards)
    assert max(opens[dataset][0], opens[one_more][0]) <= 10
    assert opens[dataset][1] > opens[one_more][1] > 1 and opens[former][0] > 2 * opens[former][1]


def test_tables_are_hashed_once_on_a_node_as_long_as_a_rank_has_them_open(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one comes after the first has opened its own, as the ranks of a start do."""
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(genome, "sha256_of", counted)
    data = config_of(dataset).data
    first = open_sources(data, "train")
    assert len(hashed) == 2
    open_sources(data, "train")
    assert len(hashed) == 2
    del first
    open_sources(data, "train")
    assert len(hashed) == 4, "a new start looks anew"


def test_one_rank_of_a_node_looks_at_the_tars_and_the_others_at_their_folders(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: Counter[str] = Counter()
    look = os.stat

    def counted(path: str | os.PathLike[str], **options: bool) -> os.stat_result:
        looked[os.fspath(path)] += 1
        return look(path, **options)

    monkeypatch.setattr(os, "stat", counted)
    monkeypatch.setattr(Path, "stat", counted)
    ranks, shards = [], sum(len(part["splits"]["train"]["shards"]) for part in load_manifest(dataset)["species"])
    for expected in ({1: shards}, {}):
        looked.clear()
        ranks.append(open_sources(config_of(dataset).data, "train"))
        ranks[-1].identity()
        assert Counter(times for path, times in looked.items() if path.endswith(".tar")) == expected
        assert len([path for path in looked if Path(path).parent == dataset and "." not in Path(path).name]) == 3


def test_a_dataset_is_another_one_where_a_tar_has_been_put_in_a_tar_s_place(former: Path) -> None:
    """Else verdicts on its bases would be taken for those on the other."""
    data = config_of(former).data
    before = open_sources(data, "train").identity()
    assert open_sources(data, "train").identity() == before
    tar = next((former / "bee").glob("train-*.tar"))
    Path(shutil.copy(tar, former / "copy")).replace(tar)
    assert open_sources(data, "train").identity() != before


def test_tables_of_shards_elsewhere_are_fetched_once_and_checked(dataset: Path, tmp_path: Path) -> None:
    config, there = config_of(dataset), Path(shutil.copytree(dataset, tmp_path / "there"))
    here = [open_sources(config.data, split) for split in ("train", "valid")]
    config.data.path, config.data.cache_dir = str(there), str(tmp_path / "cache")
    for expected in here:
        found = open_sources(config.data, expected.split)
        for ours, theirs in zip(found.sources, expected.sources, strict=True):
            assert np.array_equal(ours.table.windows, theirs.table.windows)
            assert np.array_equal(ours.table.runs, theirs.table.runs)
    fetched = sorted(path.name for path in (tmp_path / "cache").rglob("*.npy"))
    assert fetched == sorted(path.name for path in dataset.glob("*.npy"))
    for table in there.glob("*.npy"):
        table.write_bytes(b"something else")
    open_sources(config.data, "train")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match="restore it or shard again"):
        open_sources(config.data, "train")


@pytest.mark.moderate
@pytest.mark.parametrize("damage", ["a byte", "a row", "no file", "a tar is cut", "a tar is gone"])
def test_what_is_not_the_manifest_s_is_refused(dataset: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    (table,) = copy.glob("train-*.windows.npy")
    tar = next(copy.glob("bee/train-*.tar"))
    if damage == "a byte":
        table.write_bytes(table.read_bytes()[:-1] + b"\x07")
    elif damage == "a row":
        table.write_bytes(table.read_bytes()[:-39])
    elif damage == "a tar is cut":
        tar.write_bytes(tar.read_bytes()[:-1])
    else:
        (table if damage == "no file" else tar).unlink()
    advice = "restore it" if "tar" in damage else "--rebuild-index makes it again"
    with pytest.raises(UserError, match=advice):
        open_sources(config_of(copy).data, "train")
    if "tar" not in damage:
        assert shard_genome(["--verify", str(copy)]) == 1
        assert not shard_genome(["--rebuild-index", str(copy)])
        assert table.read_bytes() == (dataset / table.name).read_bytes()
        assert not shard_genome(["--verify", str(copy)])


@pytest.mark.moderate
def test_a_dataset_of_the_former_version_gets_tables_by_the_command_that_made_it(
    dataset: Path, former: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not shard_genome(["--verify", str(former)])
    source = ["--fasta", str(dataset.parent / "ant.fa"), "--species", "ant", "--out", str(former)]
    assert not shard_genome([*source, *OPTIONS, "--valid-contigs", "two", "--add"])
    names = sorted(path.name for path in dataset.iterdir() if path.suffix in (".npy", ".json"))
    assert [(former / name).read_bytes() for name in names] == [(dataset / name).read_bytes() for name in names]
    assert sorted(path.name for path in former.glob("*.npy")) == [name for name in names if name.endswith(".npy")]
