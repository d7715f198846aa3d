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

import pytest

from caduceus.data.format import load_manifest
from caduceus.errors import UserError
from tests import preloaded
from tests.conftest import REPOSITORY
from tests.data_prep.genomes import shard, tree_digest, write_fasta
from tests.data_prep.write.conftest import OPTIONS

SCRIPT = REPOSITORY / "data_prep" / "shard_genome.py"


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
        process = preloaded.Popen(command(fasta, out, "--workers", workers), start_new_session=True)
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
    preloaded.run(command(fasta, out, "--workers", workers), check=True)
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


@pytest.mark.moderate
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


@pytest.mark.moderate
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


def test_too_little_room_is_told_before_anything_is_written(fasta: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"GB are needed, 0.0 GB are free"):
        shard("--fasta", fasta, "--species", "s", "--out", tmp_path / "out", *OPTIONS, "--workers", 1)
    assert not (tmp_path / "out").exists()


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


@pytest.mark.moderate
def test_other_files_beside_a_dataset_do_no_harm(fasta: Path, dataset: Path) -> None:
    (dataset / "notes.txt").write_text("made for the paper")
    shard("--fasta", fasta, "--species", "s", "--out", dataset, *OPTIONS)
    shard("--verify", dataset, "--workers", 1)
