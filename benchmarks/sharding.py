"""How fast genomes become shards, against the disk's own speed in the same run.

    python benchmarks/sharding.py [--scale 0.1] [--workers 1 2] [--species 500] [--dir DIR]

A synthetic genome with hg38's contig lengths times `--scale` (1 is 3.1 Gbp and needs about 25 GB of disk), soft-masked
and with gaps, is sharded on both strands by each number of workers. Then `cat` and a bare Python tarfile writer write
the same tars again, and sync them as the shards are synced. Last comes a dataset of many small species.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parents[1] / "data_prep" / "shard_genome.py"
HG38 = """
248956422 242193529 198295559 190214555 181538259 170805979 159345973 145138636 138394717 133797422 135086622 133275309
114364328 107043718 101991189 90338345 83257441 80373285 58617616 64444167 46709983 50818468 156040895 57227415
"""
LINE = 60
PIECE = 960_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.1, help="of hg38's contig lengths (0.1)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--species", type=int, default=500, help="species of the dataset of small genomes (500)")
    parser.add_argument("--dir", type=Path, help="where to work: the disk to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        measure_one_genome(Path(folder), args.scale, args.workers)
        measure_small_species(Path(folder), args.species, max(args.workers))


def measure_one_genome(folder: Path, scale: float, worker_counts: list[int]) -> None:
    """One large genome: sharding, then the bare disk."""
    lengths = {f"chr{number}": int(int(bases) * scale) for number, bases in enumerate(HG38.split(), 1)}
    fasta, out = folder / "genome.fa", folder / "out"
    write_genome(fasta, lengths)
    mbp = sum(lengths.values()) / 1e6
    print(f"one genome of {mbp:,.0f} Mbp in {len(lengths)} contigs, both strands, windows of 1,048,576", flush=True)
    shard("--fasta", fasta, "--species", "big", "--out", out, "--strands", "forward")  # makes the table of the FASTA
    seconds = {}
    for workers in dict.fromkeys(worker_counts):
        shutil.rmtree(out)
        cost = shard("--fasta", fasta, "--species", "big", "--out", out, "--workers", workers)
        seconds[workers] = cost.seconds
        print(
            f"  {workers} workers: {mbp / cost.seconds:7.1f} Mbp/s, {mbp / cost.cpu_seconds:6.1f} Mbp per core-second, "
            f"at most {cost.peak_mib:.0f} MiB in a process",
            flush=True,
        )
    tars = sorted(out.glob("*/*.tar"))
    megabytes = sum(tar.stat().st_size for tar in tars) / 1e6
    fastest = min(seconds.values())
    for name, write in (("cat", write_with_cat), ("tarfile", write_with_tarfile)):
        took = timed(write, tars, folder / "copy")
        shutil.rmtree(folder / "copy")
        share = took / fastest
        print(f"  {name:8s}{megabytes / took:7.0f} MB/s; sharding: {megabytes / fastest:.0f} MB/s, {share:.0%} of it")
    shutil.rmtree(out)
    fasta.unlink()


def measure_small_species(folder: Path, count: int, workers: int) -> None:
    """Many genomes of about 1 Mbp in ten contigs each."""
    rng = np.random.default_rng(0)
    lines, bases = ["species:"], 0
    for number in range(count):
        lengths = {f"contig{contig}": int(rng.integers(50_000, 150_000)) for contig in range(10)}
        bases += sum(lengths.values())
        write_genome(folder / f"species{number}.fa", lengths)
        lines.append(f"  - {{name: species{number}, fasta: species{number}.fa, valid_contigs: [contig0]}}")
    (folder / "species.yaml").write_text("\n".join(lines))
    print(f"{count} species, {bases / 1e6:,.0f} Mbp", flush=True)
    cost = shard("--genomes", folder / "species.yaml", "--out", folder / "out", "--workers", workers)
    print(
        f"  {workers} workers: {cost.seconds:.1f} s, {count / cost.seconds:.1f} species/s, "
        f"{cost.cpu_seconds / count * 1e3:.0f} core-ms per species"
    )


class Cost:
    """What a finished command took: wall seconds, CPU seconds of it and its workers, peak memory of one process."""

    def __init__(self, command: list[str]) -> None:
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        self.seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.peak_mib = after.ru_maxrss / 1024


def shard(*arguments: object) -> Cost:
    return Cost([sys.executable, str(SCRIPT), *map(str, arguments)])


def write_genome(path: Path, lengths: dict[str, int]) -> None:
    """Random bases in lines of 60, half of them lower case in stretches, and N at both ends as assemblies have it.

    In small pieces: the memory of this process would count as a child's peak.
    """
    rng = np.random.default_rng(len(lengths))
    block = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, size=PIECE)]
    block = block | np.repeat(rng.integers(0, 2, size=PIECE // 240).astype(np.uint8) * 32, 240)
    with path.open("wb") as file:
        for name, length in lengths.items():
            file.write(f">{name}\n".encode())
            gap = min(10_000, length // 100)
            for start in range(0, length, PIECE):
                bases = np.roll(block, int(rng.integers(PIECE)))[: length - start]
                positions = np.arange(start, start + len(bases))
                bases[(positions < gap) | (positions >= length - gap)] = ord("N")
                whole = len(bases) // LINE * LINE
                lines = np.full((whole // LINE, LINE + 1), ord("\n"), np.uint8)
                lines[:, :LINE] = bases[:whole].reshape(-1, LINE)
                file.write(lines.tobytes() + bases[whole:].tobytes() + b"\n" * (whole < len(bases)))


def write_with_cat(tars: list[Path], folder: Path) -> None:
    """`cat` each tar into a new file and sync it."""
    for tar in tars:
        with (folder / tar.name).open("wb") as file:
            subprocess.run(["cat", str(tar)], stdout=file, check=True)
            os.fsync(file.fileno())


def write_with_tarfile(tars: list[Path], folder: Path) -> None:
    """Write each tar's members anew with Python's tarfile, from memory, and sync it."""
    for tar in tars:
        with tarfile.open(tar) as source, (folder / tar.name).open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as target:
                for member in source:
                    target.addfile(member, BytesIO(source.extractfile(member).read()))
            file.flush()
            os.fsync(file.fileno())


def timed(write: Callable[[list[Path], Path], None], tars: list[Path], folder: Path) -> float:
    """Seconds to write the tars into an empty folder."""
    folder.mkdir()
    started = time.perf_counter()
    write(tars, folder)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
