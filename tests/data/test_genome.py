"""Random access: any interval of any window, on either strand, and refusals of what is missing or damaged."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset

from caduceus.data import ShardedGenome
from caduceus.data.cache import Shard
from caduceus.data.format import FORMAT, INDEX_VERSION, build_manifest
from caduceus.data.shard_files import MAX_OPEN_FILES, ShardFiles
from caduceus.errors import UserError
from caduceus.files import dump_json, fingerprint
from tests.data.shard_fixture import Species, complement_string, random_bases, tile, write_dataset


def test_every_interval_is_the_genome(shards: Path, species: list[Species]) -> None:
    genome = ShardedGenome(shards)
    assert sorted(genome.species) == sorted(one.name for one in species)
    rng = np.random.default_rng(0)
    for one in species:
        for contig, start, end in (window for windows in one.windows.values() for window in windows):
            for _ in range(5):
                first, last = sorted(rng.choice(np.arange(start, end + 1), 2, replace=False).tolist())
                bases = one.contigs[contig][first:last]
                assert genome.read(one.name, contig, first, last).tobytes().decode() == bases
                assert genome.read(one.name, contig, first, last, "-").tobytes().decode() == complement_string(bases)


def test_each_window_stands_once_whatever_strands_are_stored(shards: Path, species: list[Species]) -> None:
    genome = ShardedGenome(shards)
    for one in species:
        for split, windows in one.windows.items():
            table = genome.table(one.name, split)
            found = [
                (table.contigs[w["contig"]], int(w["start"]), int(w["start"]) + int(w["length"])) for w in table.windows
            ]
            assert found == windows
    assert len(genome.table("worm", "valid").windows) == 0


def test_runs_are_in_forward_coordinates(tmp_path: Path) -> None:
    bases = "A" * 100 + "N" * 40 + "C" * 300 + "n" * 16 + "G" * 15
    for strands in ("both", "forward", "random"):
        one = Species(
            "s", {"c": bases, "d": bases}, {"train": tile("c", len(bases), 471) + tile("d", 471, 471)}, None, strands
        )
        runs = ShardedGenome(write_dataset(tmp_path / strands, [one])).table("s", "train").runs
        assert sorted(runs.tolist()) == [(0, 100, 40), (0, 440, 16), (1, 100, 40), (1, 440, 16)]


def test_stock_webdataset_reads_the_same_bases(shards: Path) -> None:
    genome = ShardedGenome(shards)
    tars = sorted(str(path) for path in (shards / "fly").glob("train-*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert len(samples) == 2 * len(genome.table("fly", "train").windows)
    for sample in samples:
        meta = sample["json"]
        bases = genome.read(meta["species"], meta["contig"], meta["start"], meta["end"], meta["strand"])
        assert bases.tobytes() == sample["seq"]


def test_intervals_outside_a_window_are_refused(shards: Path) -> None:
    genome = ShardedGenome(shards)
    for contig, start, end in (("chr1", 4000, 4100), ("chr1", 19_990, 20_001), ("chr1", 5, 5), ("chr1", -5, 5)):
        with pytest.raises(UserError, match=f"{contig}:{start}-{end}"):
            genome.read("fly", contig, start, end)
    with pytest.raises(UserError, match="no contig 'chr9'"):
        genome.read("fly", "chr9", 0, 5)
    with pytest.raises(UserError, match=r"no species 'ape'.*fly"):
        genome.read("ape", "chr1", 0, 5)
    with pytest.raises(UserError, match="strand"):
        genome.read("fly", "chr1", 0, 5, "forward")


def test_nested_and_overlapping_windows_hold_what_lies_in_any_of_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = Species(
        "s",
        {"a": random_bases(rng, 3_000), "b": random_bases(rng, 9_000)},
        {"train": [("a", 0, 3_000), ("b", 1_000, 5_000), ("b", 1_500, 2_000)], "valid": [("b", 1_500, 1_600)]},
    )
    one.windows["test"] = [("b", start, start + 700) for start in range(4_000, 8_001, 350)]
    held = [window for windows in one.windows.values() for window in windows]
    genome = ShardedGenome(write_dataset(tmp_path, [one]))
    assert genome.read("s", "b", 2_200, 4_900).tobytes().decode() == one.contigs["b"][2_200:4_900]
    for _ in range(1_000):
        contig = rng.choice(["a", "b"])
        start = int(rng.integers(0, 9_000))
        end = start + int(rng.integers(1, 1_000))
        if any(contig == name and first <= start and end <= last for name, first, last in held):
            assert genome.read("s", contig, start, end).tobytes().decode() == one.contigs[contig][start:end]
        else:
            with pytest.raises(UserError, match="no window"):
                genome.read("s", contig, start, end)


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(MAX_OPEN_FILES + 20)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number % 256]) * 3)
    files = ShardFiles([Shard(path, 3, "") for path in paths])
    buffer = np.empty(2, np.uint8)
    for number in [*range(len(paths)), *range(len(paths))]:
        files.read_into(number, 1, buffer)
        assert buffer.tolist() == [number % 256] * 2
    with pytest.raises(OSError, match="ends before"):
        files.read_into(0, 2, buffer)


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def open_all(directory: Path) -> None:
    genome = ShardedGenome(directory)
    for name in genome.species:
        for split in ("train", "valid"):
            genome.table(name, split)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_a_damaged_index_is_refused(damaged: Path, content: bytes) -> None:
    path = damaged / "fly" / "train-000000.index.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-000000\.index\.npz"):
        open_all(damaged)


@pytest.mark.parametrize("at", range(0, 100, 7))
def test_a_flipped_byte_of_an_index_is_refused(damaged: Path, at: int) -> None:
    path = damaged / "fly" / "train-000000.index.npz"
    content = bytearray(path.read_bytes())
    content[at * len(content) // 100] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-000000\.index\.npz"):
        open_all(damaged)


def test_swapped_indexes_are_refused(damaged: Path) -> None:
    one, other = damaged / "fly" / "train-000000.index.npz", damaged / "fly" / "train-000001.index.npz"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000.\.index\.npz"):
        open_all(damaged)


def test_an_index_of_another_tar_is_refused_even_where_the_manifest_agrees(damaged: Path) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    entry = next(part for part in manifest["species"] if part["name"] == "fly")["splits"]["train"]["shards"][0]
    index = (damaged / "worm" / "train-000000.index.npz").read_bytes()
    (damaged / "fly" / "train-000000.index.npz").write_bytes(index)
    entry["index_sha256"] = hashlib.sha256(index).hexdigest()
    (damaged / "manifest.json").write_bytes(dump_json(build_manifest(manifest["species"])))
    with pytest.raises(UserError, match="does not describe"):
        open_all(damaged)


@pytest.mark.parametrize("name", ["..", ".", "", "../worm/train-000000.tar", "/etc/passwd", "fly\0.tar"])
@pytest.mark.parametrize("of", ["species", "shard"])
def test_a_name_that_leaves_the_directory_is_refused_even_where_the_fingerprint_agrees(
    damaged: Path, of: str, name: str
) -> None:
    manifest = json.loads((damaged / "manifest.json").read_text())
    part = next(part for part in manifest["species"] if part["name"] == "fly")
    (part if of == "species" else part["splits"]["train"]["shards"][0])["name"] = name
    (damaged / "manifest.json").write_bytes(dump_json(build_manifest(manifest["species"])))
    with pytest.raises(UserError, match=r"manifest\.json: parts of the manifest are missing or of the wrong type"):
        ShardedGenome(damaged)


def test_a_missing_or_truncated_tar_is_refused(damaged: Path) -> None:
    tar = damaged / "fly" / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"train-000001\.tar.*bytes, but the manifest says"):
        open_all(damaged)
    tar.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar.*cannot be read"):
        open_all(damaged)


def test_a_directory_without_a_sound_manifest_is_refused(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        ShardedGenome(tmp_path)
    path = damaged / "manifest.json"
    text = path.read_text()
    species = json.loads(text)["species"]
    species[0]["splits"]["train"]["shards"][0]["name"] = "../../elsewhere.tar"
    path.write_bytes(dump_json(_manifest_of(species)))
    with pytest.raises(UserError, match="parts of the manifest"):
        ShardedGenome(damaged)
    for broken in ("{", "[]", text.replace('"weight": null', '"weight": 2', 1), text.replace("caduceus-shards", "x")):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"manifest\.json"):
            ShardedGenome(damaged)


def test_a_manifest_with_missing_parts_is_refused(damaged: Path) -> None:
    species = json.loads((damaged / "manifest.json").read_text())["species"]
    for key in ("contigs", "splits", "name"):
        stripped = [{name: value for name, value in part.items() if name != key} for part in species[1:]]
        (damaged / "manifest.json").write_bytes(dump_json(_manifest_of(stripped)))
        with pytest.raises(UserError, match=r"manifest\.json"):
            open_all(damaged)


def _manifest_of(species: list[dict]) -> dict:
    manifest = {"format": FORMAT, "version": INDEX_VERSION, "species": species}
    return {**manifest, "fingerprint": fingerprint(manifest)}


def test_large_shards_are_read_beyond_4_gib(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.seek(5 << 30)
        file.write(random_bases(np.random.default_rng(0), 10).encode())
    buffer = np.empty(10, np.uint8)
    ShardFiles([Shard(path, (5 << 30) + 10, "")]).read_into(0, 5 << 30, buffer)
    assert buffer.tobytes().decode() == random_bases(np.random.default_rng(0), 10)
