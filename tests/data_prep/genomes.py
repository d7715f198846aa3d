"""Small genomes for tests, an independent reading of FASTA, and running the command."""

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.data.format import load_manifest
from caduceus.errors import UserError
from data_prep.shard_genome import main

SMALL = ("--window", 500, "--min-window", 20, "--min-acgt", 0, "--workers", 1)
"""Options for contigs of some hundred bases."""
COMPLEMENT = str.maketrans("ACGTURYSWKMBDHVNacgturyswkmbdhvn", "TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn")


def random_bases(rng: np.random.Generator, length: int) -> str:
    """Bases with lower-case stretches, a few IUPAC codes and a run of N where there is room."""
    bases = rng.choice(list("ACGT"), size=length)
    for _ in range(length // 400):
        start = int(rng.integers(length))
        stretch = slice(start, start + int(rng.integers(1, 200)))
        bases[stretch] = np.char.lower(bases[stretch])
    for position in rng.integers(0, length, size=length // 300):
        bases[position] = rng.choice(list("RYSWKMBDHVNryn"))
    return "".join(bases)


def write_fasta(path: Path, contigs: Mapping[str, str], width: int = 60) -> Path:
    """A plain FASTA."""
    lines = []
    for name, bases in contigs.items():
        lines += [f">{name} a description", *(bases[i : i + width] for i in range(0, len(bases), width))]
    path.write_text("\n".join(lines) + "\n")
    return path


def read_fasta(text: str) -> dict[str, str]:
    """An independent reading of FASTA text."""
    contigs: dict[str, str] = {}
    for record in text.split(">")[1:]:
        header, *lines = record.split("\n")
        contigs[header.split()[0]] = "".join(line.strip() for line in lines)
    return contigs


def reverse_complement(bases: str) -> str:
    return bases[::-1].translate(COMPLEMENT)


def shard(*arguments: object) -> str:
    """Run the command in this process; returns what it prints. A user's mistake is a `UserError`."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = main([str(argument) for argument in arguments])
    if status:
        raise UserError(f"status {status}: {output.getvalue()}")
    return output.getvalue()


def dataset_of(directory: Path) -> dict[str, Any]:
    """What the manifest says of a dataset's only species."""
    (part,) = load_manifest(directory)["species"]
    return part


def tar_samples(directory: Path) -> dict[str, dict[str, bytes]]:
    """Every sample of a dataset by stock tarfile: key -> extension -> content."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(directory.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                assert extension not in samples.setdefault(key, {}), f"{member.name} stands twice"
                samples[key][extension] = tar.extractfile(member).read()
    return samples


def tree_digest(directory: Path) -> dict[str, str]:
    """sha256 of every file of a dataset, hidden ones aside."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.startswith(".")
    }


def windows_of(directory: Path) -> set[tuple[str, str, int, int]]:
    """Split, contig, start and end of every window of a dataset."""
    texts = [json.loads(files["json"]) for files in tar_samples(directory).values()]
    return {(text["split"], text["contig"], text["start"], text["end"]) for text in texts}
