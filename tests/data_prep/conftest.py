"""Places for genome files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

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
