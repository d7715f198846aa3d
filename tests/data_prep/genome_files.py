"""Genome files as the tools of others write them, and what a genome read from one must be."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

Contigs = dict[str, str]
FASTA = b">a one\nACGTACGT\nACGT\n>b\nGGCC\n"


def bgzip(text: bytes, block: int = 65280, eof: bool = True) -> bytes:
    """The text as bgzip writes it."""
    pieces = [text[at : at + block] for at in range(0, len(text), block)] + ([b""] if eof else [])
    return b"".join(map(bgzf_block, pieces))


def bgzf_block(data: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    body = deflate.compress(data) + deflate.flush()
    header = struct.pack("<4BI2BH2BHH", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, len(body) + 25)
    return header + body + struct.pack("<II", zlib.crc32(data), len(data))


def twobit(contigs: Contigs, order: str, version: int = 0) -> bytes:
    """A .2bit file of contigs of A, C, G, T and N; order is < or >."""

    def blocks(flags: list[bool]) -> bytes:
        edges = np.flatnonzero(np.diff([0, *flags, 0]))
        starts, ends = edges[::2], edges[1::2]
        table = np.concatenate([[len(starts)], starts, ends - starts])
        return table.astype(f"{order}u4").tobytes()

    records = []
    for bases in contigs.values():
        codes = ["TCAG".find(base) if base in "TCAG" else 0 for base in bases.upper()] + [0] * (-len(bases) % 4)
        packed = bytes(64 * a + 16 * b + 4 * c + d for a, b, c, d in zip(*[iter(codes)] * 4, strict=True))
        record = struct.pack(f"{order}I", len(bases)) + blocks([base in "Nn" for base in bases])
        records.append(record + blocks([base.islower() for base in bases]) + bytes(4) + packed)
    width = 4 + 4 * version
    offset = 16 + sum(1 + len(name) + width for name in contigs)
    index = b""
    for name, record in zip(contigs, records, strict=True):
        index += bytes([len(name)]) + name.encode() + struct.pack(f"{order}{'IQ'[version]}", offset)
        offset += len(record)
    return struct.pack(f"{order}4I", 0x1A412743, version, len(contigs), 0) + index + b"".join(records)


def check(genome, contigs: Contigs, data=None) -> None:
    assert genome.contigs == {name: len(bases) for name, bases in contigs.items()}
    assert list(genome.contigs) == list(contigs)
    for name, bases in contigs.items():
        assert genome.read(name, 0, len(bases)).decode() == bases
        for _ in range(4 if data else 0):
            start = data.draw(st.integers(0, len(bases)))
            end = data.draw(st.integers(start, len(bases)))
            assert genome.read(name, start, end).decode() == bases[start:end]


def cache_of(path: Path) -> Path:
    return path.parent / "cache"


def settled(path: Path) -> Path:
    """The file with an older time stamp, so that a scan of it can be trusted later."""
    old = path.stat().st_mtime - 100
    os.utime(path, (old, old))
    return path
