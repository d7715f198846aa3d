"""A mistake on any command line is one line and exit status 2."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

WHOLE, NUMBER = "must be a whole number, got 'many'; see --help", "must be a number, got 'nan'; see --help"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("data_prep/shard_genome.py --fasta a.fa --species a --out o --window many", f"--window: {WHOLE}"),
        ("data_prep/shard_genome.py --fasta a.fa --species a --out o --min-acgt nan", f"--min-acgt: {NUMBER}"),
        ("launch/shard.py --genomes a.yaml --out o --cpus-per-task many", f"--cpus-per-task: {WHOLE}"),
        ("launch/slurm.py --nodes many", f"--nodes: {WHOLE}"),
        ("launch/runs.py logs run --rank many", f"--rank: {WHOLE}"),
        ("launch/runs.py stop run --now", "unrecognized arguments: --now; see --help"),
        ("launch/runs.py begin", "action: invalid choice: 'begin'"),
        ("-m caduceus.train data.seq_len=1024", "the following arguments are required: --config; see --help"),
    ],
)
def test_a_mistake_is_told_in_a_line(command: str, message: str) -> None:
    done = subprocess.run([sys.executable, *command.split()], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"error: {message}")
