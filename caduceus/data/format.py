"""Shard format 2, defined once: manifest, per-shard index, and random access to the bases. Imports no torch.

Format 1, which is read as well, has no tables.

OUT/manifest.json                       complete dataset; written last
OUT/SPLIT-0123456789ab.windows.npy      the windows of all species, and
OUT/SPLIT-0123456789ab.runs.npy         their runs of other codes than ACGT: caduceus/data/windows.py
OUT/SPECIES/species.json                one species' part of the manifest; written when its shards are complete
OUT/SPECIES/SPLIT-000000.tar            uncompressed POSIX tar: KEY.seq (bases) and KEY.json per sample
OUT/SPECIES/SPLIT-000000.index.npz      where each sample's bases lie, and what they hold
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.errors import UserError
from caduceus.files import fingerprint
from caduceus.patience import patient, patiently

FORMAT = "caduceus-shards"
FORMAT_VERSION = 2
INDEX_VERSION = 1
"""Version of shards and indexes; part of the fingerprint."""
MANIFEST = "manifest.json"
SPLITS = ("train", "valid", "test")
STRAND_SYMBOLS = ("+", "-")
MIN_RUN = 16
"""Shortest run of non-ACGT codes that an index lists."""

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the first base, in bytes from the start of the tar
        ("length", "<u4"),  # bases
        ("contig", "<u4"),  # row of the species' contig table
        ("start", "<u8"),  # on the forward strand, 0-based
        ("strand", "u1"),  # 0 is +, 1 is - (the stored bases are the reverse complement)
        ("acgt", "<u4"),  # count of A, C, G and T in either case
        ("lower", "<u4"),  # count of lower-case bases
        ("crc32", "<u4"),  # of the stored bases
    ]
)
RUN_DTYPE = np.dtype(
    [
        ("sample", "<u4"),  # row of the sample table
        ("start", "<u4"),  # first position of the run in the stored bases
        ("length", "<u4"),
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """Index of one tar: `samples` (INDEX_DTYPE, in tar order) and `runs` (RUN_DTYPE, by sample and start)."""

    samples: np.ndarray
    runs: np.ndarray

    def to_bytes(self) -> bytes:
        """The .npz file; the same tables give the same bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, samples=self.samples.astype(INDEX_DTYPE), runs=self.runs.astype(RUN_DTYPE))
        return buffer.getvalue()

    @classmethod
    @patient
    def load(cls, path: str | Path) -> "ShardIndex":
        """Read an index. Raises `UserError` where the file is missing or is not an index."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                index = cls(samples=arrays["samples"], runs=arrays["runs"])
        except FileNotFoundError:
            raise UserError(f"{path}: the index is missing; shard the genome again, or restore the file") from None
        except Exception as error:
            raise UserError(f"{path}: not a shard index ({error})") from None
        if index.samples.dtype != INDEX_DTYPE or index.runs.dtype != RUN_DTYPE:
            raise UserError(f"{path}: not an index of format {INDEX_VERSION}")
        return index


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def index_path(tar_path: str | Path) -> Path:
    """Path of the index that belongs to a tar."""
    return Path(tar_path).with_suffix(".index.npz")


def build_manifest(species: list[dict[str, Any]], tables: dict[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of a dataset from its species' parts, sorted by name, so that merged datasets equal those made in
    one go.

    A part is {name, assembly, file, sha256, contigs: [{name, length}], weight, plan: {option: value}, splits: {split:
    {samples, bases, shards: [{name, bytes, sha256, index_sha256, samples, bases}]}}, report: {…}}. `samples` and
    `bases` count what is stored, so both strands of a window count twice. `tables`: {split: {windows: {name, bytes,
    sha256}, runs: the same, counts: {windows, runs, bases: [of each species that has the split]}}}, which follow from
    the shards, so that the fingerprint is that of the same shards without tables.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": INDEX_VERSION,
        "species": sorted(species, key=lambda part: part["name"]),
    }
    manifest = {**manifest, "fingerprint": fingerprint(manifest)}
    return manifest if tables is None else {**manifest, "version": FORMAT_VERSION, "tables": tables}


def load_manifest(directory: str | Path) -> dict[str, Any]:
    """Read and check `manifest.json` of a shard directory."""
    path = Path(directory) / MANIFEST
    try:
        content = patiently(path.read_bytes)
    except FileNotFoundError:
        raise UserError(
            f"{directory}: no complete shard dataset here ({MANIFEST} is missing); "
            "make one with data_prep/shard_genome.py, or run the same command again to finish it"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: not readable as a manifest ({error})") from None
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, path: str) -> dict[str, Any]:
    """Check the content of a `manifest.json`. Raises `UserError`, which names `path`, where it is not sound."""
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: not readable as a manifest ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of a shard dataset")
    if manifest.get("version") not in (INDEX_VERSION, FORMAT_VERSION):
        raise UserError(
            f"{path}: format version {manifest.get('version')}, but this program reads versions up to {FORMAT_VERSION}"
        )
    recorded = manifest.get("fingerprint")
    of_shards = {key: value for key, value in manifest.items() if key not in ("fingerprint", "tables")}
    computed = fingerprint({**of_shards, "version": INDEX_VERSION})
    if recorded != computed:
        raise UserError(f"{path}: fingerprint {recorded} does not match its content {computed}; the file was changed")
    if not _is_complete(manifest):
        raise UserError(f"{path}: parts of the manifest are missing or of the wrong type; shard the genomes again")
    return manifest


_TABLES = ("windows", "runs")
_SHARD_FIELDS = {"name": str, "bytes": int, "sha256": str, "index_sha256": str, "samples": int, "bases": int}


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has everything that its readers rely on."""
    try:
        shards = [
            shard for part in manifest["species"] for split in part["splits"].values() for shard in split["shards"]
        ]
        contigs = [contig for part in manifest["species"] for contig in part["contigs"]]
        names = [part["name"] for part in manifest["species"]]
        return (
            len(set(names)) == len(names)
            and all(_is_file_name(name) for name in [*names, *(shard["name"] for shard in shards)])
            and all(isinstance(contig["name"], str) and isinstance(contig["length"], int) for contig in contigs)
            and all(isinstance(shard[field], kind) for shard in shards for field, kind in _SHARD_FIELDS.items())
            and all(_is_table(manifest, split, table) for split, table in manifest.get("tables", {}).items())
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _is_table(manifest: dict[str, Any], split: str, table: dict[str, Any]) -> bool:
    holders = sum(split in part["splits"] for part in manifest["species"])
    counts = [table["counts"][name] for name in ("windows", "runs", "bases")]
    return all(
        _is_file_name(table[kind]["name"]) and isinstance(table[kind]["sha256"], str) for kind in _TABLES
    ) and all(
        len(of_species) == holders and all(isinstance(count, int) for count in of_species) for of_species in counts
    )


def _is_file_name(name: Any) -> bool:
    """Whether a name from a manifest is one of a file or folder inside its directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name
