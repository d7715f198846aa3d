"""Fixtures shared by all tests."""

import contextlib
import gc
import io
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep import shard_genome
from tests import preloaded  # which keeps the variables as they are now  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST_FIRST = (
    "train/test_faults.py",
    "ops/test_triton.py",
    "slurm/test_faults.py",
    "docs/test_commands.py",
    "ops/test_aot.py",
    "monitor/test_failing_server.py",
    "distributed/test_options.py",
    "distributed/test_watching.py",
    "train/test_trainer.py",
    "slurm/test_operations.py",
    "monitor/test_wandb.py",
    "demo/test_run.py",
    "model/test_triton.py",
    "train/test_recomputation.py",
    "distributed/test_strategies.py",
    "slurm/test_launch.py",
    "train/test_stages.py",
    "launch/test_local.py",
    "distributed/test_restarts.py",
    "train/test_stopping.py",
    "train/test_torchrun.py",
    "evaluate/test_ranks.py",
    "config/test_fixed.py",
    "slurm/test_virtual_cluster.py",
    "distributed/deepspeed/test_settings.py",
    "train/test_resident_memory.py",
    "test_wheel.py",
    "slurm/test_scheduler.py",
    "launch/test_peers.py",
)
"""Files in the order of their start, some at a time: the long first, and those that wait beside those that compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module", autouse=True)
def only_own_garbage() -> None:
    """No collection, with which each training begins, looks through what was imported and made before this file."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A training that a signal ended ignores further ones. Children of later tests would inherit that, and not end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real genomes kept beside a developer's checkout; tests that want them skip where they are absent."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no ../shared/data with real genomes beside this checkout")
    return path


def write_random_fasta(path: Path, seed: int, contigs: dict[str, int]) -> None:
    """A FASTA of random bases in both cases, with a stretch of N in every contig over 2,000 bases."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for name, length in contigs.items():
            bases = rng.choice(np.frombuffer(b"ACGTacgt", np.uint8), length)
            if length > 2000:
                bases[1000:1300] = ord("N")
            text = bases.tobytes().decode()
            file.write(f">{name}\n" + "".join(text[i : i + 60] + "\n" for i in range(0, length, 60)))


def shard(directory: Path, species: str, fasta: Path, *options: str) -> None:
    """Shard a FASTA as the command does."""
    arguments = ["--fasta", str(fasta), "--species", species, "--out", str(directory), *options]
    with contextlib.redirect_stdout(io.StringIO()):
        assert shard_genome.main(arguments) == 0


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a small genome: windows of 2,048 bases, contigs chr1 and chr2 to train on, chr3 to validate on."""
    directory = tmp_path_factory.mktemp("small")
    write_random_fasta(directory / "genome.fa", 1, {"chr1": 30_000, "chr2": 9_000, "chr3": 10_000})
    options = ["--window", "2048", "--valid-contigs", "chr3", "--workers", "1"]
    shard(directory / "shards", "small", directory / "genome.fa", *options)
    return directory / "shards"


@pytest.fixture(scope="session")
def two_species(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two genomes, small and large, of 10,000 and 30,000 bases to train on, in windows of 2,048 bases."""
    directory = tmp_path_factory.mktemp("species")
    for name, length in {"small": 10_000, "large": 30_000}.items():
        write_random_fasta(directory / f"{name}.fa", length, {f"{name}1": length, f"{name}2": 5_000})
        options = [
            "--window",
            "2048",
            "--valid-contigs",
            f"{name}2",
            "--workers",
            "1",
            *(["--add"] if name == "large" else []),
        ]
        shard(directory / "shards", name, directory / f"{name}.fa", *options)
    return directory / "shards"
