"""Genomes and the files of the plan behind addresses, from a real server on this computer."""

import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from caduceus.errors import UserError
from tests.conftest import REPOSITORY
from tests.data_prep.genomes import random_bases, shard, tree_digest, write_fasta

SMALL = ("--window", 500, "--min-window", 20, "--min-acgt", 0, "--workers", 1)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two genomes of the same file name, and files for the plan."""
    rng = np.random.default_rng(6)
    for folder in ("a", "b"):
        (tmp_path / "files" / folder).mkdir(parents=True)
        write_fasta(tmp_path / "files" / folder / "x.fa", {"chr1": random_bases(rng, 3000)})
    (tmp_path / "files" / "rows.bed").write_text("one\t0\t2500\ttrain\n")
    (tmp_path / "files" / "black.bed").write_text("one\t100\t200\n")
    (tmp_path / "files" / "names.tsv").write_text("chr1\tone\n")
    return tmp_path / "files"


@pytest.fixture
def address(files: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=files))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def shard_genome(out: Path, place: object, folder: str, *options: object) -> dict[str, str]:
    files = ("--intervals", f"{place}/rows.bed", "--exclude-bed", f"{place}/black.bed", "--aliases")
    source = ("--fasta", f"{place}/{folder}/x.fa", "--species", "s", "--out", out)
    shard(*source, *files, f"{place}/names.tsv", *SMALL, *options)
    return tree_digest(out)


def test_an_address_gives_what_the_file_gives(files: Path, address: str, tmp_path: Path) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    for folder in ("a", "b"):  # the same name from two addresses
        fetched = shard_genome(tmp_path / folder / "out", address, folder, *cache)
        assert fetched == shard_genome(tmp_path / f"local {folder}" / "out", files, folder)
    (files / "a" / "x.fa").rename(files / "a" / "gone.fa")
    assert shard_genome(tmp_path / "a" / "out", address, "a", *cache), "what was fetched once stays"


def test_addresses_in_a_species_file(files: Path, address: str, tmp_path: Path) -> None:
    def write(name: str, place: object) -> Path:
        path = tmp_path / name
        path.write_text(
            f"defaults: {{aliases: '{place}/names.tsv', exclude_bed: ['{place}/black.bed']}}\n"
            f"species: [{{name: s, fasta: '{place}/a/x.fa', intervals: '{place}/rows.bed'}}]\n"
        )
        return path

    for name, place in (("fetched", address), ("local", files)):
        shard(
            "--genomes", write(f"{name}.yaml", place), "--out", tmp_path / name / "out", *SMALL, "--cache-dir", tmp_path
        )
    assert tree_digest(tmp_path / "fetched") == tree_digest(tmp_path / "local")


def test_what_is_no_address_or_not_there_is_one_line(address: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{address}/none\.fa: not found on the server \(404\)"):
        shard("--fasta", f"{address}/none.fa", "--species", "s", "--out", tmp_path / "out", "--cache-dir", tmp_path)
    with pytest.raises(UserError, match=f"--out: takes a local path, got the address {address}/out"):
        shard("--fasta", files / "a" / "x.fa", "--species", "s", "--out", f"{address}/out")
    with pytest.raises(UserError, match=f"{address}/x: is an address"):
        shard("--genome", f"{address}/x", "--out", tmp_path / "out")
    entry = tmp_path / "entry.yaml"
    entry.write_text(f"name: x\nfasta: {address}/a/x.fa\n")
    with pytest.raises(UserError, match=f"'fasta' takes a local file, got {address}/a/x.fa"):
        shard("--genome", entry, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.moderate
@pytest.mark.parametrize("arguments", [["hg38"], ["x.fa", "--out", "."], ["./x.fa", "--out", "."]])
def test_a_mistake_of_fetch_genome_is_one_line(files: Path, arguments: list[str]) -> None:
    command = [sys.executable, str(REPOSITORY / "data_prep" / "fetch_genome.py"), *arguments]
    done = subprocess.run(command, cwd=files / "a", capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "needs no download" in done.stderr or "the following arguments are required: --out" in done.stderr
