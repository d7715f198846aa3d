"""gpn's own command on an export, where this package is not installed, against this package's scores.

    python benchmarks/gpn_vep.py --gpn GPN_ENV/bin/python --genome genome.fa[.gz] [--snvs 100000]

`GPN_ENV`: an environment with PyPI's gpn, its extras `data` and `inference`, and torch. The model is a small
Caduceus-PS with random weights. gpn masks each variant in a window, on both strands, and averages the log-likelihood
ratios.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import processor
from caduceus import CaduceusConfig, CaduceusForMaskedLM, hub
from caduceus.alphabet import CADUCEUS, reverse_complement
from data_prep.genome.genome import open_genome

WINDOW = 128


def main() -> None:
    """Score variants by both, and print how far they are apart, or with --snvs how fast each is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpn", required=True, metavar="PYTHON", help="the Python of an environment with gpn")
    parser.add_argument("--genome", required=True, metavar="FASTA", help="a genome, such as sacCer3.fa.gz")
    parser.add_argument("--variants", type=int, default=40)
    parser.add_argument("--snvs", type=int, metavar="N", help="instead: the rate over so many, by either's own command")
    parser.add_argument("--of-gpn", type=int, metavar="N", help="how many of --snvs gpn gets; default all")
    parser.add_argument("--gpn-batch", type=int, default=8, metavar="N", help="gpn's --per_device_batch_size")
    options = parser.parse_args()
    genome = open_genome(options.genome)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.snvs is not None:
            compare_rates(options, genome, folder)
            return
        model = random_model()
        hub.save_published(model, folder / "export")
        variants = some_variants(genome, options.variants)
        theirs, wall, _ = by_gpn(options, folder, variants)
    ours = np.array([score(model, genome, *variant) for variant in variants])
    print(f"{processor()}, torch {torch.__version__}")
    print(f"{len(ours)} variants, scores up to {abs(ours).max():.2f}; gpn took {wall:.0f} s")
    print(f"largest difference: {abs(ours - theirs).max():.1e}")


def compare_rates(options: argparse.Namespace, genome, folder: Path) -> None:
    """Either's own command on one export and one file, as processor time, which other work on a machine changes little.

    gpn compiles the model first, and finds it compiled the next time. So it gets a few variants twice; what it takes
    for many beyond the second time is for the others.
    """
    hub.save_published(random_model(), folder / "export")
    variants = some_variants(genome, options.snvs)
    load = os.getloadavg()[0]
    few, many = variants[:64], variants[: options.of_gpn]
    by_gpn(options, folder, few)
    _, _, start = by_gpn(options, folder, few)
    theirs, wall, total = by_gpn(options, folder, many)
    rows = ["gpn run_vep", wall, total, (total - start) / (len(many) - len(few))]
    ours, wall, total = by_command(options, folder, variants)
    print(f"{processor()}, {os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    print(f"torch {torch.__version__}, windows of {WINDOW} bases, both strands; gpn in batches of {options.gpn_batch}")
    print("| command | SNVs | seconds | processor seconds | per 100,000 SNVs |\n|---|---|---|---|---|")
    print(f"| gpn run_vep | {len(many):,} | {rows[1]:.0f} | {rows[2]:.0f} | {rows[3] * 1e5:.0f} |")
    print(f"| evaluate variants | {len(variants):,} | {wall:.0f} | {total:.0f} | {total / len(variants) * 1e5:.0f} |")
    print(f"ratio of processor time per SNV: {rows[3] / (total / len(variants)):.1f}; its start not counted for gpn")
    print(f"largest difference of scores: {np.abs(ours[: len(theirs)] - theirs).max():.1e}")


def by_gpn(options: argparse.Namespace, folder: Path, variants: list) -> tuple[np.ndarray, float, float]:
    """Scores of gpn's command, its seconds, and its processor seconds."""
    write_variants(folder / "variants.parquet", variants)
    command = [options.gpn, "-m", "gpn.ss.run_vep", "variants.parquet", str(Path(options.genome).resolve())]
    command += [str(WINDOW), "export", "scores.parquet", "--is_file"]
    command += ["--per_device_batch_size", str(options.gpn_batch)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    seconds = timed(command, folder, environment)
    return pq.read_table(folder / "scores.parquet")["score"].to_numpy(), *seconds


def by_command(options: argparse.Namespace, folder: Path, variants: list) -> tuple[np.ndarray, float, float]:
    """As `by_gpn`, of this package's command."""
    write_variants(folder / "variants.parquet", variants)
    command = [sys.executable, "-m", "caduceus.evaluate", "variants", "--model", "export", "--window", str(WINDOW)]
    command += ["--input", "variants.parquet", "--genome", str(Path(options.genome).resolve()), "--out", "ours.parquet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    seconds = timed(command, folder, environment)
    return pq.read_table(folder / "ours.parquet")["llr"].to_numpy(), *seconds


def write_variants(path: Path, variants: list) -> None:
    names, columns = ("chrom", "pos", "ref", "alt"), zip(*variants, strict=True)
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), path)


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Run a command; its seconds, and those of processors in it and what it started."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, cwd=folder, env=environment, check=True)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def random_model() -> CaduceusForMaskedLM:
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(CaduceusConfig(d_model=16, n_layer=2, rcps=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def some_variants(genome, count: int) -> list[tuple[str, int, str, str]]:
    """(contig, 1-based position, reference, alternative); the first so near to the contig's start that N stand in."""
    rng = np.random.default_rng(0)
    contig, length = next(iter(genome.contigs.items()))
    found = []
    while len(found) < count:
        position = int(rng.integers(WINDOW, length - WINDOW)) if found else WINDOW // 4
        reference = chr(genome.read(contig, position - 1, position)[0]).upper()
        if reference in "ACGT":
            found.append((contig, position, reference, str(rng.choice([base for base in "ACGT" if base != reference]))))
    return found


@torch.no_grad()
def score(model: CaduceusForMaskedLM, genome, contig: str, position: int, reference: str, alternative: str) -> float:
    """Log-likelihood ratio of a variant, masked, the mean of both strands."""
    middle, half = position - 1, WINDOW // 2
    bases = np.frombuffer(genome.read(contig, max(middle - half, 0), middle + half), np.uint8)
    bases = np.pad(bases, (WINDOW - len(bases), 0), constant_values=ord("N"))
    pair = np.frombuffer((reference + alternative).encode(), np.uint8)
    total = 0.0
    for window, place, alleles in ((bases, half, pair), (reverse_complement(bases), half - 1, pair)):
        alleles = alleles if place == half else reverse_complement(alleles)[::-1]
        ids = torch.from_numpy(CADUCEUS.encode(window).astype(np.int64))[None]
        ids[0, place] = CADUCEUS.mask
        logits = model(ids).logits[0, place]
        before, after = CADUCEUS.encode(alleles)
        total += (logits[int(after)] - logits[int(before)]).item() / 2
    return total


if __name__ == "__main__":
    main()
