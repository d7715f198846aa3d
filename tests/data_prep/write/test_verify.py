"""What `--verify` finds in a dataset, down to any changed byte."""

import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caduceus.data.format import ShardIndex, index_path
from caduceus.errors import UserError
from tests.data_prep.genomes import shard


def flip_base(out: Path) -> None:
    path = out / "s" / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[int(ShardIndex.load(index_path(path)).samples[3]["offset"]) + 100] ^= 1
    path.write_bytes(content)


def flip_json(out: Path) -> None:
    path = out / "s" / "train-000001.tar"
    path.write_bytes(path.read_bytes().replace(b'"chr1", "split"', b'"chr2", "split"', 1))


def flip_header(out: Path) -> None:
    path = out / "s" / "train-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"ustar", b"usTar", 1))


def cut_tar(out: Path) -> None:
    path = out / "s" / "train-000001.tar"
    os.truncate(path, path.stat().st_size // 2)


def swap_indexes(out: Path) -> None:
    one, two = (out / "s" / f"train-00000{number}.index.npz" for number in (0, 1))
    one.rename(out / "s" / "x"), two.rename(one), (out / "s" / "x").rename(two)


def swap_tars(out: Path) -> None:
    one, two = (out / "s" / f"train-00000{number}.tar" for number in (0, 1))
    one.rename(out / "s" / "x"), two.rename(one), (out / "s" / "x").rename(two)


def flip_index(out: Path) -> None:
    path = out / "s" / "train-000001.index.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    flip_base: r"train-000001\.tar: s-\S+: its bases were changed \(crc32\)",
    flip_json: r"train-000001\.tar: s-\S+: index and tar differ in contig|train-000001.tar: its bytes were changed",
    flip_header: r"train-000001\.tar: at byte 0: there is no member header of a shard",
    cut_tar: r"train-000001\.tar: has [\d,]+ bytes instead of [\d,]+",
    swap_indexes: r"train-000001\.index\.npz: its bytes were changed, or it is the index of another tar",
    swap_tars: r"train-000001\.tar: ",
    flip_index: r"train-000001\.index\.npz: its bytes were changed",
    lambda out: (out / "s" / "train-000001.tar").unlink(): r"train-000001\.tar: is missing",
    lambda out: (out / "s" / "train-000001.index.npz").unlink(): r"train-000001\.index\.npz: is missing",
    lambda out: (out / "s" / "species.json").write_text("{}"): r"species\.json: differs from the manifest",
    lambda out: shutil.copy(out / "s" / "train-000000.tar", out / "s" / "train-000099.tar"): r"000099.*not in the man",
    lambda out: shutil.copy(out / "s" / "train-000000.index.npz", out / "s" / "train-000099.index.npz"): (
        r"s/train-000099\.index\.npz: is not in the manifest"
    ),
    lambda out: shutil.copytree(out / "s", out / "t"): r"t/train-000000\.tar: is not in the manifest",
    lambda out: shutil.copy(out / "s" / "train-000000.tar", out / "x.tar"): r"/x\.tar: is not in the manifest",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_verify_names_the_damage(dataset: Path, damage, capsys: pytest.CaptureFixture) -> None:
    damage(dataset)
    with pytest.raises(UserError, match="problem"):
        shard("--verify", dataset, "--workers", 1)
    lines = capsys.readouterr().err
    assert re.search(DAMAGE[damage], lines), lines


def test_verify_says_that_the_report_is_missing(dataset: Path, capsys: pytest.CaptureFixture) -> None:
    (dataset / "report.html").unlink()
    assert "sound" in shard("--verify", dataset, "--workers", 1)
    assert re.search(r"note: .*report\.html is missing", capsys.readouterr().err)


def test_verify_refuses_a_changed_manifest(dataset: Path) -> None:
    path = dataset / "manifest.json"
    path.write_text(path.read_text().replace('"weight": 1.0', '"weight": 2.0'))
    with pytest.raises(UserError, match=r"fingerprint .* does not match its content"):
        shard("--verify", dataset)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_found(dataset: Path, data: st.DataObject) -> None:
    files = sorted(path for path in dataset.rglob("*") if path.suffix in (".tar", ".npz", ".json"))
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    content = bytearray(before)
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "insert":
            content.insert(data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 255)))
    path.write_bytes(content)
    try:
        if path.suffix != ".json" or content.split() != before.split():  # blank space in JSON says nothing
            with pytest.raises(UserError):
                shard("--verify", dataset, "--workers", 1)
    finally:
        path.write_bytes(before)


def test_a_damaged_tar_is_not_indexed(dataset: Path) -> None:
    cut_tar(dataset)
    with pytest.raises(
        UserError, match=r"train-000001\.tar: the file ends within .*; restore the tar, or shard the genome again"
    ):
        shard("--rebuild-index", dataset)
