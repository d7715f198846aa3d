"""gpn's own command on an export, where this package is not installed, against this package's scores.

    python benchmarks/gpn_vep.py --gpn GPN_ENV/bin/python --genome genome.fa[.gz]

`GPN_ENV`: an environment with PyPI's gpn, its extras `data` and `inference`, and torch. The model is a small
Caduceus-PS with random weights. gpn masks each variant in a window, on both strands, and averages the log-likelihood
ratios.
"""

import argparse
import os
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
    """Score variants by both, and print how far they are apart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpn", required=True, metavar="PYTHON", help="the Python of an environment with gpn")
    parser.add_argument("--genome", required=True, metavar="FASTA", help="a genome, such as sacCer3.fa.gz")
    parser.add_argument("--variants", type=int, default=40)
    options = parser.parse_args()
    model = random_model()
    genome = open_genome(options.genome)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hub.save_published(model, folder / "export")
        variants = some_variants(genome, options.variants)
        names, columns = ("chrom", "pos", "ref", "alt"), zip(*variants, strict=True)
        pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), folder / "variants.parquet")
        command = [options.gpn, "-m", "gpn.ss.run_vep", "variants.parquet", str(Path(options.genome).resolve())]
        command += [str(WINDOW), "export", "scores.parquet", "--is_file"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
        started = time.monotonic()
        subprocess.run(command, cwd=folder, env=environment, check=True)
        seconds = time.monotonic() - started
        theirs = pq.read_table(folder / "scores.parquet")["score"].to_numpy()
    ours = np.array([score(model, genome, *variant) for variant in variants])
    print(f"{processor()}, torch {torch.__version__}")
    print(f"{len(ours)} variants, scores up to {abs(ours).max():.2f}; gpn took {seconds:.0f} s")
    print(f"largest difference: {abs(ours - theirs).max():.1e}")


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
