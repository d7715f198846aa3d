"""Sharding species by species and merging equals sharding them together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from caduceus.errors import UserError
from launch import shard
from tests.conftest import REPOSITORY, write_random_fasta


def write_species(folder: Path) -> Path:
    """Two species in a file, with weights that depend on their sizes."""
    write_random_fasta(folder / "a.fa", 1, {"chr1": 9000, "chr2": 5000})
    write_random_fasta(folder / "b.fa", 2, {"chrA": 7000})
    path = folder / "species.yaml"
    path.write_text(
        "weights: bases^0.5\ndefaults: {window: 2048}\nspecies:\n"
        "- {name: first, fasta: a.fa, valid_contigs: [chr2]}\n- {name: second, fasta: b.fa, weight: 2}\n"
    )
    return path


def contents(dataset: Path) -> dict[str, bytes]:
    """All files of a dataset."""
    files = [path for path in dataset.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(dataset)): path.read_bytes()
        for path in files
        if not path.relative_to(dataset).parts[0].startswith(".")
    }


def shard_together(species: Path, out: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "data_prep" / "shard_genome.py"), "--genomes", str(species)]
    subprocess.run([*command, "--workers", "1", "--out", str(out)], check=True, capture_output=True)


def shard_apart(species: Path, out: Path, *request: str) -> str:
    command = [sys.executable, str(REPOSITORY / "launch" / "shard.py"), "--genomes", str(species), "--out", str(out)]
    done = subprocess.run([*command, *request], env=dict(os.environ), capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("species", "request_", "message"),
    [
        ("{name: dog, fasta: dog.fa}", [], r"dog: .*/dog\.fa: no such file"),
        ("{name: dog, fasta: a.fa, intervals: dog.bed}", [], r"dog: .*dog\.bed: no such file"),
        ("{name: dog, fasta: a.fa}", ["--chain", "3"], "chain: is for training runs"),
    ],
)
def test_what_jobs_would_fail_for_is_refused_before(fake_slurm, monkeypatch, tmp_path, species, request_, message):
    write_random_fasta(tmp_path / "a.fa", 1, {"chr1": 3000})
    path = tmp_path / "species.yaml"
    path.write_text(f"species:\n- {species}\n")
    command = ["shard.py", "--genomes", str(path), "--out", str(tmp_path / "out"), *request_]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match=message):
        shard.main()
    assert not fake_slurm.asked("sbatch") and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_this_machine_and_again(tmp_path):
    species = write_species(tmp_path)
    together, apart = tmp_path / "together" / "data", tmp_path / "apart" / "data"
    apart.parent.mkdir()
    shard_together(species, together)
    for _ in range(2):
        shard_apart(species, apart, "--cluster", "local")
        assert contents(apart) == contents(together)
        assert not (apart / ".jobs" / "parts").exists()
