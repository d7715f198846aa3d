"""Kills, full disks, second runs, damaged files and bad input: nothing half-written, and one clear line."""

import fcntl
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caduceus.data.format import ShardIndex, index_path, load_manifest
from caduceus.errors import UserError
from tests.conftest import REPOSITORY
from tests.data_prep.genomes import random_bases, shard, tree_digest, write_fasta

SCRIPT = REPOSITORY / "data_prep" / "shard_genome.py"
OPTIONS = ("--window", "2000", "--min-window", "10", "--shard-bytes", "64KiB", "--valid-contigs", "chr2")


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(8)
    contigs = {f"chr{number}": random_bases(rng, length) for number, length in enumerate((60_000, 20_000), 1)}
    return write_fasta(tmp_path_factory.mktemp("fasta") / "g.fa", contigs)


@pytest.fixture(scope="module")
def undisturbed(fasta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    shard("--fasta", fasta, "--species", "s", "--out", out, *OPTIONS, "--workers", 1)
    return out


@pytest.fixture
def dataset(undisturbed: Path, tmp_path: Path) -> Path:
    """A dataset that the test may damage."""
    return Path(shutil.copytree(undisturbed, tmp_path / "out"))


def command(fasta: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--fasta", str(fasta), "--species", "s", "--out", str(out), *OPTIONS, *options]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(
    fasta: Path, undisturbed: Path, tmp_path: Path, workers: str
) -> None:
    random.seed(int(workers))
    out = tmp_path / "out"
    kills, seconds = 0, float("inf")  # the first run is left alone, and tells how long one takes
    while kills < 10:
        started = time.monotonic()
        process = subprocess.Popen(command(fasta, out, "--workers", workers), start_new_session=True)
        try:
            process.wait(timeout=random.uniform(0.25, 1.0) * min(seconds, 300))
            assert process.returncode == 0
            seconds = min(seconds, time.monotonic() - started)  # aim within a run that does all the work
            assert tree_digest(out) == tree_digest(undisturbed)
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the workers are left to notice by themselves
            process.wait()
            kills += 1
            assert not (out / "manifest.json").exists() or load_manifest(out)
        seconds *= 1.05
    subprocess.run(command(fasta, out, "--workers", workers), check=True)
    assert tree_digest(out) == tree_digest(undisturbed)
    assert sorted(path.name for path in out.rglob(".*")) == [".lock"]


def test_finished_shards_are_kept_when_a_run_goes_on(fasta: Path, undisturbed: Path, tmp_path: Path, monkeypatch):
    from data_prep.write import sharding

    out = tmp_path / "out"
    written = []

    def write_two(task):
        if len(written) == 2:
            raise UserError("stop here")
        written.append(task.path.name)
        return write_shard(task)

    write_shard = sharding.write_shard
    monkeypatch.setattr(sharding, "write_shard", write_two)
    arguments = ("--fasta", fasta, "--species", "s", "--out", out, *OPTIONS, "--workers", 1)
    with pytest.raises(UserError, match="stop here"):
        shard(*arguments)
    assert sorted(path.name for path in out.rglob("*.tar")) == sorted(written)
    with pytest.raises(UserError, match="no complete shard dataset"):
        load_manifest(out)
    with pytest.raises(UserError, match="was begun with window 2000, but now it is 1000"):
        shard(*arguments, "--window", 1000)
    with (out / "s" / ".unfinished.jsonl").open("ab") as journal:
        journal.write(b'{"name": "train-0')  # as a kill in the middle of a line leaves it
    (out / "s" / ".train-000005.tar.1.tmp").write_bytes(b"left over")
    times = {name: (out / "s" / name).stat().st_mtime_ns for name in written}
    monkeypatch.undo()
    shard(*arguments)
    assert times == {name: (out / "s" / name).stat().st_mtime_ns for name in written}
    assert tree_digest(out) == tree_digest(undisturbed)
    assert not list(out.rglob(".*.tmp"))


def test_leftovers_of_a_kill_at_the_very_end_are_removed(fasta: Path, undisturbed: Path, dataset: Path) -> None:
    (dataset / "s" / ".unfinished.jsonl").write_text("{}\n")
    (dataset / ".manifest.json.7.tmp").write_text("{")
    (dataset / "manifest.json").unlink()
    shard("--fasta", fasta, "--species", "s", "--out", dataset, *OPTIONS)
    assert tree_digest(dataset) == tree_digest(undisturbed)
    assert [path.name for path in dataset.rglob(".*")] == [".lock"]


LOSSES = {
    "tar": lambda folder: (folder / "train-000001.tar").unlink(),
    "short tar": lambda folder: os.truncate(folder / "train-000001.tar", 1000),
    "index": lambda folder: (folder / "valid-000000.index.npz").unlink(),
    "short index": lambda folder: os.truncate(folder / "valid-000000.index.npz", 100),
    "all": lambda folder: [path.unlink() for path in folder.glob("*.tar")],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_command_restores_what_was_lost(
    fasta: Path, undisturbed: Path, dataset: Path, loss: str, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    from data_prep.write import sharding

    arguments = ("--fasta", fasta, "--species", "s", "--out", dataset, *OPTIONS, "--workers", 1)
    LOSSES[loss](dataset / "s")

    def interrupt(task: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # ended before the first shard is written
        patch.setattr(sharding, "write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            shard(*arguments)
    shard(*arguments)
    assert tree_digest(dataset) == tree_digest(undisturbed)
    assert [path.name for path in dataset.rglob(".*")] == [".lock"]
    assert re.search(r"/s: \d+ of \d+ shards are missing or damaged; writing", capsys.readouterr().err)


def test_a_second_run_into_the_directory_refuses(fasta: Path, dataset: Path) -> None:
    with (dataset / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing here"):
            shard("--fasta", fasta, "--species", "s", "--out", dataset, *OPTIONS)


def test_a_full_disk_is_a_clean_error_and_resumable(fasta: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The limit on file sizes stands for the full disk: both make `write` fail in the middle of a tar."""
    out = tmp_path / "out"
    limit = 40_000

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = subprocess.run(
        command(fasta, out, "--workers", "1"), preexec_fn=small_files, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*the disk is full .* run the same command again to go on\n", result.stderr)
    assert not list(out.rglob("*.tar")) and not list(out.rglob("*.tmp")) and not (out / "manifest.json").exists()
    shard("--fasta", fasta, "--species", "s", "--out", out, *OPTIONS, "--workers", 1)
    assert tree_digest(out) == tree_digest(undisturbed)


def test_a_run_that_fails_leaves_nothing_half_written(fasta: Path, tmp_path: Path, monkeypatch) -> None:
    from data_prep.write import sharding

    out = tmp_path / "out"

    def fail(species, pool) -> None:
        species[0].directory.begin()
        (species[0].directory.path / ".train-000000.tar.1.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sharding, "write_species", fail)
    with pytest.raises(KeyboardInterrupt):
        shard("--fasta", fasta, "--species", "s", "--out", out, *OPTIONS, "--workers", 1)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    big = write_fasta(tmp_path / "big.fa", {"chr1": "ACGT" * 5_000_000, "chr2": "ACGT" * 1000})
    process = subprocess.Popen(
        command(big, tmp_path / "out", "--workers", "1"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not list((tmp_path / "out").glob("s/.*.tmp")):
        time.sleep(0.001)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "interrupted; run the same command again to go on\n")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_tar_is_not_indexed(dataset: Path) -> None:
    cut_tar(dataset)
    with pytest.raises(
        UserError, match=r"train-000001\.tar: ends within .*; restore the tar, or shard the genome again"
    ):
        shard("--rebuild-index", dataset)


def test_too_little_room_is_told_before_anything_is_written(fasta: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"GB are needed, 0.0 GB are free"):
        shard("--fasta", fasta, "--species", "s", "--out", tmp_path / "out", *OPTIONS, "--workers", 1)
    assert not (tmp_path / "out").exists()


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
    flip_header: r"train-000001\.tar: at byte 0: no member header of a shard",
    cut_tar: r"train-000001\.tar: has [\d,]+ bytes instead of [\d,]+",
    swap_indexes: r"train-000001\.index\.npz: its bytes were changed, or it belongs to another tar",
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


def test_a_foreign_directory_is_left_alone(fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    arguments = ("--fasta", fasta, "--species", "s", "--out", tmp_path, *OPTIONS, "--workers", 1)
    with pytest.raises(UserError, match=r"holds thesis\.tex and no shard dataset"):
        shard(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "s").mkdir()
    shutil.move(tmp_path / "thesis.tex", tmp_path / "s")
    with pytest.raises(UserError, match=r"/s: holds other files"):
        shard(*arguments)
    assert [path.name for path in tmp_path.rglob("*")] == ["s", "thesis.tex"]


def test_other_files_beside_a_dataset_do_no_harm(fasta: Path, dataset: Path) -> None:
    (dataset / "notes.txt").write_text("made for the paper")
    shard("--fasta", fasta, "--species", "s", "--out", dataset, *OPTIONS)
    shard("--verify", dataset, "--workers", 1)
