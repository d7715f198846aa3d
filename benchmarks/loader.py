"""How fast one core makes masked training batches, beside other ways to make them from the same genome.

    python benchmarks/loader.py [--bases 100000000] [--seq-lens 1024 131072 1048576] [--seconds 2] [--rounds 3]

All run in turns in one process with one thread, draw random crops on random strands, mask 15 % of the bases, and give
int64 inputs and labels in batches of `--tokens`. The files are in the page cache, and seconds are those of the
processor that the process has had, so other load counts little. The best round of each counts. The contenders:
  caduceus      the training loader, without worker processes, windows checked before
  first touch   the same from a cold start, where each window is read whole once, to check its crc32
  webdataset    stock WebDataset over the same tars: whole windows, shuffled, cut into crops, tokens and masks by numpy
  pyfaidx       as the published dataset does: a random interval of an indexed FASTA as a Python string, reverse
                complement by string, one token id per character by a dictionary, masks by torch
  pread         no tokens at all: the bytes of the same crops, the limit of the disk (or of the page cache)
"""

import argparse
import datetime
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyfaidx
import torch
import webdataset
from machine import processor

from caduceus.allocator import keep_freed_memory
from caduceus.alphabet import CADUCEUS, IGNORE_LABEL, IS_ACGT_BYTE
from caduceus.config import config_from_dict
from caduceus.data import ShardedGenome, build_loader

SHARD_GENOME = Path(__file__).resolve().parents[1] / "data_prep" / "shard_genome.py"
CONTIGS = 8
MASK_PROB, MASK_TOKEN_PROB, RANDOM_TOKEN_PROB = 0.15, 0.8, 0.1
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=int, default=100_000_000, help="of the synthetic genome (100,000,000)")
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[1024, 131_072, 1_048_576])
    parser.add_argument("--tokens", type=int, default=1 << 17, help="in a batch, or one sequence if that is more")
    parser.add_argument("--seconds", type=float, default=2, help="of each contender in a round (2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender (3)")
    parser.add_argument("--dir", type=Path, help="where to put the genome: the disk to measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(
        f"{datetime.date.today()} · {processor()}, one thread, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        fasta, shards = Path(folder, "genome.fa"), Path(folder, "shards")
        write_genome(fasta, args.bases // CONTIGS)
        command = [sys.executable, SHARD_GENOME, "--fasta", fasta, "--species", "s", "--out", shards, "--min-acgt", "0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        print(
            f"{args.bases:,} bases, windows of at most 1,048,576; million bases per second, and the ratio to caduceus\n"
        )
        print(f"{'':14}" + "".join(f"{f'L = {seq_len:,}':>24}" for seq_len in args.seq_lens))
        columns = [measure(fasta, shards, seq_len, args) for seq_len in args.seq_lens]
        for name in columns[0]:
            cells = (f"{column[name]:12.1f} ({column[name] / column['caduceus']:6.3f} x)" for column in columns)
            print(f"{name:14}" + "".join(f"{cell:>24}" for cell in cells))


def measure(fasta: Path, shards: Path, seq_len: int, args: argparse.Namespace) -> dict[str, float]:
    """Million bases per second of every contender at one length."""
    batch = max(1, args.tokens // seq_len)
    contenders: dict[str, Callable[[], Batches]] = {
        "caduceus": lambda: caduceus_batches(shards, seq_len, batch, read_before=True),
        "first touch": lambda: caduceus_batches(shards, seq_len, batch, read_before=False),
        "webdataset": lambda: webdataset_batches(shards, seq_len, batch),
        "pyfaidx": lambda: pyfaidx_batches(fasta, seq_len, batch),
        "pread": lambda: pread_batches(shards, seq_len, batch),
    }
    best = dict.fromkeys(contenders, 0.0)
    for _ in range(args.rounds):
        for name, make in contenders.items():
            batches = make()
            next(batches)
            start, count = time.process_time(), 0
            while time.process_time() - start < args.seconds:
                next(batches)
                count += 1
            rate = count * batch * seq_len / (time.process_time() - start) / 1e6
            best[name] = max(best[name], rate)
    return best


def write_genome(path: Path, contig_bases: int) -> None:
    """Random bases, soft-masked in stretches, in lines of 60 with an index for pyfaidx."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for contig in range(CONTIGS):
            bases = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, contig_bases, dtype=np.uint8)]
            lower = np.repeat(rng.random(contig_bases // 300 + 1) < 0.5, 300)[:contig_bases]
            bases = bases + 32 * lower.astype(np.uint8)
            whole = contig_bases // 60 * 60
            lines = np.full((whole // 60, 61), ord("\n"), np.uint8)
            lines[:, :60] = bases[:whole].reshape(-1, 60)
            file.write(f">chr{contig + 1}\n".encode() + lines.tobytes())
    pyfaidx.Fasta(str(path))


def caduceus_batches(shards: Path, seq_len: int, batch: int, read_before: bool) -> Batches:
    data = {"path": str(shards), "seq_len": seq_len, "workers": 0, "min_acgt": 0, "check_crc": not read_before}
    config = config_from_dict({"data": data, "train": {"global_batch": batch, "micro_batch": batch}})
    for one in build_loader(config):
        yield one.input_ids, one.labels


def webdataset_batches(shards: Path, seq_len: int, batch: int) -> Batches:
    rng = np.random.default_rng(0)
    tars = sorted(map(str, shards.glob("s/train-*.tar")))
    windows = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).repeat().shuffle(16)

    def crops() -> Iterator[np.ndarray]:
        for window in windows:
            bases = np.frombuffer(window["seq"], np.uint8)
            for begin in range(0, len(bases) - seq_len + 1, seq_len):
                yield bases[begin : begin + seq_len]

    def mixed() -> Iterator[np.ndarray]:
        return webdataset.shuffle(max(1, (1 << 23) // seq_len), rng=random.Random(0))(crops())

    source = mixed()
    while True:
        bases = np.stack(list(itertools.islice(source, batch)))
        tokens = CADUCEUS.encode(bases)
        chosen = (rng.random(bases.shape, np.float32) < MASK_PROB) & IS_ACGT_BYTE[bases]
        kind = rng.random(bases.shape, np.float32)
        labels = np.where(chosen, tokens.astype(np.int8), IGNORE_LABEL)
        random_tokens = rng.integers(CADUCEUS.bases[0], CADUCEUS.bases[3] + 1, bases.shape, dtype=np.uint8)
        inputs = np.where(chosen & (kind < MASK_TOKEN_PROB), CADUCEUS.mask, tokens)
        shown_at_random = chosen & (kind >= MASK_TOKEN_PROB) & (kind < MASK_TOKEN_PROB + RANDOM_TOKEN_PROB)
        inputs = np.where(shown_at_random, random_tokens, inputs)
        yield torch.from_numpy(inputs).long(), torch.from_numpy(labels).long()


def pyfaidx_batches(fasta: Path, seq_len: int, batch: int) -> Batches:
    genome = pyfaidx.Fasta(str(fasta))
    lengths = {record.name: len(record) for record in genome}
    vocabulary = {token: number for number, token in enumerate(CADUCEUS.tokens)}
    complement = {"A": "T", "C": "G", "G": "C", "T": "A"}
    rng = random.Random(0)

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        name = rng.choice(list(lengths))
        start = rng.randrange(lengths[name] - seq_len + 1)
        text = str(genome[name][start : start + seq_len]).upper()
        if rng.random() < 0.5:
            text = "".join(complement[base] for base in reversed(text))
        tokens = torch.tensor([vocabulary[base] for base in text])
        chosen = torch.bernoulli(torch.full(tokens.shape, MASK_PROB)).bool()
        labels = torch.where(chosen, tokens, IGNORE_LABEL)
        as_mask = torch.bernoulli(torch.full(tokens.shape, MASK_TOKEN_PROB)).bool() & chosen
        rest = RANDOM_TOKEN_PROB / (1 - MASK_TOKEN_PROB)
        at_random = torch.bernoulli(torch.full(tokens.shape, rest)).bool() & chosen & ~as_mask
        tokens[as_mask] = CADUCEUS.mask
        tokens[at_random] = torch.randint(CADUCEUS.bases[0], CADUCEUS.bases[3] + 1, tokens.shape)[at_random]
        return tokens, labels

    while True:
        inputs, labels = zip(*(sample() for _ in range(batch)), strict=True)
        yield torch.stack(inputs), torch.stack(labels)


def pread_batches(shards: Path, seq_len: int, batch: int) -> Batches:
    table = ShardedGenome(shards).table("s", "train")
    descriptors = [os.open(shard.path, os.O_RDONLY) for shard in table.shards]
    tiles = table.windows["length"].astype(np.int64) // seq_len
    window = np.repeat(np.arange(len(tiles)), tiles)
    tile = np.arange(len(window)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    offsets = table.windows["offset"][window].astype(np.int64) + tile * seq_len
    places = list(zip(table.windows["shard"][window].tolist(), offsets.tolist(), strict=True))
    rng = random.Random(0)
    bases = np.empty((batch, seq_len), np.uint8)
    shown = torch.from_numpy(bases)
    while True:
        for row, (shard, offset) in enumerate(rng.choices(places, k=batch)):
            os.preadv(descriptors[shard], [bases[row]], offset)
        yield shown, shown


if __name__ == "__main__":
    main()
