"""One small dataset of three species, shared by the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from caduceus.config import Config, config_from_dict
from tests.data.shard_fixture import Species, random_bases, tile, write_dataset
from tests.data.shard_server import Server, serving


@pytest.fixture(scope="session")
def species() -> list[Species]:
    rng = np.random.default_rng(0)
    one = random_bases(rng, 20_000)
    gapped = random_bases(rng, 5_000) + "N" * 3_000 + random_bases(rng, 4_000, "ACGTRYN")
    other = random_bases(rng, 9_000)
    return [
        Species(
            "fly",
            {"chr1": one, "chr.2": gapped},
            {
                "train": tile("chr1", len(one), 4_096) + tile("chr.2", len(gapped), 4_096)[:-1],
                "valid": tile("chr.2", len(gapped), 4_096)[-1:],
            },
        ),
        Species("worm", {"c": other}, {"train": tile("c", len(other), 2_048)}, strands="random"),
        Species("yeast", {"I": other[::-1]}, {"valid": tile("I", len(other), 3_000)}, strands="forward"),
    ]


@pytest.fixture(scope="session")
def shards(species: list[Species], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("shards"), species)


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with serving(shards) as server:
        yield server


@pytest.fixture
def configure(shards: Path) -> Callable[..., Config]:
    """A configuration over the small dataset; keywords are `data.*`, and `train`, `model`, `valid` whole sections."""

    def make(train: dict | None = None, model: dict | None = None, valid: dict | None = None, **data) -> Config:
        return config_from_dict(
            {
                "data": {"path": str(shards), "seq_len": 256, "workers": 0, **data},
                "train": {"global_batch": 24, "micro_batch": 4, **(train or {})},
                "model": model or {},
                "valid": valid or {},
            }
        )

    return make
