"""Places for genome files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from caduceus.data.format import load_manifest
from tests.data_prep.genomes import SMALL, random_bases, shard, write_fasta

settings.register_profile("unhurried", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("unhurried")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A new file's path for each hypothesis example."""
    base, numbers = tmp_path_factory.mktemp("genomes"), iter(range(10**9))

    def make(content: bytes, name: str = "genome.fa") -> Path:
        path = base / str(next(numbers)) / name
        path.parent.mkdir()
        path.write_bytes(content)
        return path

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(12)


@pytest.fixture(scope="module")
def genomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three genomes, fly, worm and weed."""
    folder = tmp_path_factory.mktemp("genomes")
    rng = np.random.default_rng(5)
    for name, lengths in {"fly": (4000, 2500), "worm": (3000, 700), "weed": (6000, 100)}.items():
        contigs = {f"chr{number}": random_bases(rng, length) for number, length in enumerate(lengths, 1)}
        write_fasta(folder / f"{name}.fa", {**contigs, "chrM": random_bases(rng, 60)})
    return folder


@pytest.fixture
def shards(genomes: Path, tmp_path: Path):
    """Shards one genome into a fresh directory; returns that and its part of the manifest."""

    def make(*options: object, species: str = "fly") -> tuple[Path, dict]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        shard("--fasta", genomes / f"{species}.fa", "--species", species, "--out", out, *SMALL, *options)
        return out, load_manifest(out)["species"][0]

    return make
