"""Writes a shard's tar and index from its plan in one pass, each under a temporary name until it is complete."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib  # its crc32 is several times faster than zlib's

from caduceus.alphabet import COMPLEMENT_BYTE
from caduceus.data.format import INDEX_DTYPE, RUN_DTYPE, STRAND_SYMBOLS, ShardIndex, index_path
from caduceus.files import replacing, write_atomically
from data_prep.genome.genome import Genome, open_genome
from data_prep.plan.composition import composition
from data_prep.plan.species import SpeciesPlan
from data_prep.tar_format import BLOCK, END, SampleJson, member_header, padding
from data_prep.write.directory import writing
from data_prep.write.index_rows import listed_runs, reverse_runs, run_table

_WRITE_BYTES = 1 << 20
_COMPLEMENT = COMPLEMENT_BYTE.tobytes()
_STRAND_WORDS = ("fwd", "rev")


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write a shard. It is small, as it is sent between processes."""

    path: Path
    size: int
    genome: Path
    cache_dir: Path | None
    species: str
    assembly: str
    split: str
    windows: np.ndarray
    strands: np.ndarray
    contigs: dict[int, tuple[str, str]]  # row of the contig table -> the contig's name, and its name in keys


def shard_tasks(plan: SpeciesPlan, directory: Path) -> list[ShardTask]:
    """The tasks that write a species into its directory, in the order of the manifest."""
    names = list(plan.contigs)
    request = plan.request
    return [
        ShardTask(
            path=directory / shard.name,
            size=shard.size,
            genome=request.fasta,
            cache_dir=request.cache_dir,
            species=request.name,
            assembly=request.assembly,
            split=shard.split,
            windows=plan.windows[shard.rows],
            strands=plan.strands[shard.rows],
            contigs={row: (names[row], plan.contig_keys[row]) for row in np.unique(plan.windows[shard.rows]["contig"])},
        )
        for shard in plan.shards
    ]


def write_shard(task: ShardTask) -> dict[str, Any]:
    """Write a tar and its index, and return the shard's row of the manifest: {name, bytes, sha256, …}.

    After a failure there is neither a tar nor an index under its final name.
    """
    with writing(task.path), replacing(task.path, buffering=0) as file:
        tar = _TarStream(file)
        index = _write_samples(task, reopen_genome(task.genome, task.cache_dir), tar)
        tar.finish()
        assert tar.position == task.size, "a tar has the size that the plan computed"
        index_bytes = index.to_bytes()
        write_atomically(index_path(task.path), index_bytes)
    return {
        "name": task.path.name,
        "bytes": tar.position,
        "sha256": tar.sha256.hexdigest(),
        "index_sha256": hashlib.sha256(index_bytes).hexdigest(),
        "samples": len(index.samples),
        "bases": int(index.samples["length"].sum()),
    }


@lru_cache(maxsize=4)
def reopen_genome(path: Path, cache_dir: Path | None) -> Genome:
    """Open a genome; it stays open for the next tasks of this process."""
    return open_genome(path, cache_dir)


class _TarStream:
    """Collects pieces into large writes and hashes what it writes."""

    def __init__(self, file: Any) -> None:
        self.sha256 = hashlib.sha256()
        self.position = 0  # bytes added so far
        self._file = file
        self._pieces: list[bytes] = []
        self._pending = 0

    def add(self, *pieces: bytes) -> None:
        self._pieces += pieces
        size = sum(map(len, pieces))
        self.position += size
        self._pending += size
        if self._pending >= _WRITE_BYTES:
            self._flush()

    def finish(self) -> None:
        self.add(END)
        self._flush()

    def _flush(self) -> None:
        content = b"".join(self._pieces)
        self._pieces, self._pending = [], 0
        self.sha256.update(content)
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[self._file.write(remaining) :]


def _write_samples(task: ShardTask, genome: Genome, tar: _TarStream) -> ShardIndex:
    samples = np.zeros(int(task.strands.sum()), dtype=INDEX_DTYPE)
    runs: list[np.ndarray] = [np.empty(0, dtype=RUN_DTYPE)]
    json_of = {
        row: SampleJson(task.species, task.assembly, name, task.split) for row, (name, _) in task.contigs.items()
    }
    number = 0
    for window, stored in zip(task.windows.tolist(), task.strands.tolist(), strict=True):
        contig, start, end, pad, _ = window
        name, contig_key = task.contigs[contig]
        bases = genome.read(name, start, end) + b"N" * pad
        counts = composition(np.frombuffer(bases, np.uint8))
        window_runs = listed_runs(bases) if counts.acgt < counts.bases else None
        for strand in (0, 1):
            if not stored[strand]:
                continue
            key = f"{task.species}-{contig_key}-{start}-{end}-{task.split}-{_STRAND_WORDS[strand]}"
            text = json_of[contig].encode(start, end, STRAND_SYMBOLS[strand], pad)
            content = bases if strand == 0 else np.frombuffer(bases, np.uint8)[::-1].tobytes().translate(_COMPLEMENT)
            offset = tar.position + BLOCK
            tar.add(
                member_header(f"{key}.seq", len(content)),
                content,
                padding(len(content)),
                member_header(f"{key}.json", len(text)),
                text,
                padding(len(text)),
            )
            crc = isal_zlib.crc32(content)
            samples[number] = (offset, len(content), contig, start, strand, counts.acgt, counts.lower, crc)
            if window_runs is not None:
                runs.append(run_table(number, reverse_runs(window_runs, len(content)) if strand else window_runs))
            number += 1
    return ShardIndex(samples, np.concatenate(runs))
