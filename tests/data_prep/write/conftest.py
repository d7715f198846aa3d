"""A dataset in several shards, whole and to be damaged."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data_prep.genomes import random_bases, shard, write_fasta

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
