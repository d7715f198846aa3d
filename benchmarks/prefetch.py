"""How long training waits for remote shards whose server is slow, with `shuffle_block` and a bounded cache.

    python benchmarks/prefetch.py [--latency 1] [--shards 24] [--block 2] [--seconds-per-shard 0.7] [--workers 0]

A server in this process answers each tar after `--latency` seconds. The steps spend `--seconds-per-shard` on a shard's
crops, as a model would, and one epoch is read. It prints the seconds for which steps waited for their batch, without
the first step, before which nothing can be fetched. The cache holds four blocks.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from caduceus.config import Config, config_from_dict
from caduceus.data import build_loader

SHARD_GENOME = Path(__file__).resolve().parents[1] / "data_prep" / "shard_genome.py"
SEQ_LEN, CROPS_PER_SHARD, BATCH = 1024, 256, 4
"""Bases in a crop, crops in a shard, crops in a step."""


class Slow(SimpleHTTPRequestHandler):
    """Answers tars after the server's latency."""

    def do_GET(self) -> None:
        if self.path.endswith(".tar"):
            time.sleep(self.server.latency)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=1, help="seconds before a tar is answered (1)")
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--block", type=int, default=2, help="data.shuffle_block (2)")
    parser.add_argument("--seconds-per-shard", type=float, default=0.7, help="of training (0.7)")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards, cache = Path(folder, "shards"), Path(folder, "cache")
        write_shards(shards, args.shards)
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(shards)))
        server.latency = args.latency
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = config_from_dict(
            {
                "data": {
                    "path": f"http://127.0.0.1:{server.server_port}",
                    "cache_dir": str(cache),
                    "cache_bytes": 4 * args.block * max(path.stat().st_size for path in shards.rglob("*.tar")),
                    "shuffle_block": args.block,
                    "seq_len": SEQ_LEN,
                    "workers": args.workers,
                    "strands": "forward",
                },
                "train": {"global_batch": BATCH, "micro_batch": BATCH},
            }
        )
        measure(config, args.shards * CROPS_PER_SHARD // BATCH, args.seconds_per_shard / CROPS_PER_SHARD * BATCH)
        server.shutdown()


def measure(config: Config, steps: int, seconds_per_step: float) -> None:
    waits = []
    batches = iter(build_loader(config))
    begun = time.monotonic()
    for _ in range(steps):
        before = time.monotonic()
        next(batches)
        waits.append(time.monotonic() - before)
        time.sleep(seconds_per_step)
    first, *others = waits
    stalls = [wait for wait in others if wait > 0.1]
    print(
        f"{steps} steps in {time.monotonic() - begun:.1f} s: waited {first:.1f} s for the first batch and "
        f"{sum(others):.1f} s for others; {len(stalls)} waits above 0.1 s, the longest {max(others):.2f} s"
    )


def write_shards(directory: Path, count: int) -> None:
    """A genome of `count` windows, a tar each."""
    window = CROPS_PER_SHARD * SEQ_LEN
    bases = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(0).integers(0, 4, count * window)]
    fasta = directory.with_suffix(".fa")
    fasta.write_bytes(b">chr1\n" + b"\n".join(bases.reshape(-1, 64)[row].tobytes() for row in range(len(bases) // 64)))
    command = [sys.executable, SHARD_GENOME, "--fasta", fasta, "--species", "s", "--out", directory]
    options = ["--window", window, "--strands", "forward", "--shard-bytes", window]
    subprocess.run([*map(str, command + options)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
