"""An independent, plain writer of shard format 1: what the reader is tested against."""

import hashlib
import io
import json
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caduceus.data.format import INDEX_DTYPE, MIN_RUN, RUN_DTYPE, ShardIndex, build_manifest
from caduceus.files import dump_json

PAIRS = dict(zip("ACGTURYSWKMBDHVNacgturyswkmbdhvn", "TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn", strict=True))


def complement_string(bases: str) -> str:
    """Reverse complement, letter by letter."""
    return "".join(PAIRS[base] for base in reversed(bases))


@dataclass
class Species:
    name: str
    contigs: dict[str, str]
    windows: dict[str, list[tuple[str, int, int]]]  # split -> (contig, start, end)
    weight: float | None = None
    strands: str = "both"


def random_bases(rng: np.random.Generator, length: int, alphabet: str = "ACGTacgt") -> str:
    return "".join(rng.choice(list(alphabet), length))


def tile(contig: str, length: int, window: int) -> list[tuple[str, int, int]]:
    return [(contig, start, min(start + window, length)) for start in range(0, length, window)]


def write_dataset(directory: Path, species: list[Species], windows_per_shard: int = 3) -> Path:
    for one in species:
        (directory / one.name).mkdir(parents=True, exist_ok=True)
    manifest = build_manifest([_write_species(directory, one, windows_per_shard) for one in species])
    (directory / "manifest.json").write_bytes(dump_json(manifest))
    return directory


def _write_species(directory: Path, species: Species, windows_per_shard: int) -> dict:
    names = list(species.contigs)
    splits = {}
    for split, windows in species.windows.items():
        entries = []
        for number, first in enumerate(range(0, len(windows), windows_per_shard)):
            stored = []
            for place, (contig, start, end) in enumerate(windows[first : first + windows_per_shard]):
                forward = species.contigs[contig][start:end]
                strands = {"both": "+-", "forward": "+", "random": "+-"[place % 2]}[species.strands]
                for strand in strands:
                    bases = forward if strand == "+" else complement_string(forward)
                    stored.append((names.index(contig), contig, start, strand, bases))
            name = f"{split}-{number:06d}.tar"
            entries.append(_write_shard(directory / species.name / name, species.name, stored))
        splits[split] = {
            "samples": sum(entry["samples"] for entry in entries),
            "bases": sum(entry["bases"] for entry in entries),
            "shards": entries,
        }
    return {
        "name": species.name,
        "assembly": f"{species.name}-1",
        "file": f"{species.name}.fa",
        "sha256": hashlib.sha256("".join(species.contigs.values()).encode()).hexdigest(),
        "contigs": [{"name": name, "length": len(bases)} for name, bases in species.contigs.items()],
        "weight": species.weight,
        "plan": {},
        "splits": splits,
        "report": {},
    }


def _write_shard(path: Path, species: str, stored: list[tuple[int, str, int, str, str]]) -> dict:
    samples, runs = [], []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, (contig_id, contig, start, strand, bases) in enumerate(stored):
            meta = {"species": species, "contig": contig, "start": start, "end": start + len(bases), "strand": strand}
            for suffix, content in (("seq", bases.encode()), ("json", json.dumps(meta).encode())):
                key = f"{species}-{contig.replace('.', '_')}-{start}-{'pm'[strand == '-']}"
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            acgt = sum(base in "ACGTacgt" for base in bases)
            lower = sum(base.islower() for base in bases)
            samples.append((0, len(bases), contig_id, start, strand == "-", acgt, lower, zlib.crc32(bases.encode())))
            for run in re.finditer(f"[^ACGTacgt]{{{MIN_RUN},}}", bases):
                runs.append((row, run.start(), len(run.group())))
    table = np.array(samples, INDEX_DTYPE)
    with tarfile.open(path) as tar:
        table["offset"] = [member.offset_data for member in tar if member.name.endswith(".seq")]
    index = ShardIndex(table, np.array(runs, RUN_DTYPE)).to_bytes()
    path.with_suffix(".index.npz").write_bytes(index)
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "samples": len(stored),
        "bases": sum(len(bases) for *_, bases in stored),
    }
