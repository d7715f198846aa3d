"""Which share of a genome an epoch sees: with whole crops, packed, and with shifted tilings, from contig lengths alone.

    python benchmarks/bases_seen.py [--sizes NAME=FILE …]

A genome stands for the lengths of its contigs. Shards hold windows of at most 1,048,576 bases; contigs below 1,024 are
left out. `--sizes` adds a genome from a table of names and lengths (a .fai or chrom.sizes). hg38 is its 24 chromosomes;
runs of N count as bases. What a model learns from short contigs: benchmarks/packing.py.
"""

import argparse
import sys

import numpy as np

from caduceus.data.cache import Shard
from caduceus.data.crops import CropTable
from caduceus.data.genome import WindowTable
from caduceus.data.windows import WINDOW_DTYPE, WINDOW_RUN_DTYPE, LoadedWindows
from caduceus.tables import read_lines, split_fields
from data_prep.plan.options import PlanOptions
from data_prep.plan.windows import tile

YEAST = (230218, 813184, 316620, 1531933, 576874, 270161, 1090940, 562643, 439888, 745751, 666816, 1078177, 924431)
YEAST += (784333, 1091291, 948066)
HG38 = (248956422, 242193529, 198295559, 190214555, 181538259, 170805979, 159345973, 145138636, 138394717, 133797422)
HG38 += (135086622, 133275309, 114364328, 107043718, 101991189, 90338345, 83257441, 80373285, 58617616, 64444167)
HG38 += (46709983, 50818468, 156040895, 57227415)
WINDOWS_OF_A_SHARD = 120
EPOCHS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="*", default=[], metavar="NAME=FILE")
    options = parser.parse_args()
    print("| genome | contigs | bases | seq_len | whole crops | shifted, an epoch | shifted, in 4 | packed |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, lengths in {**genomes(), **dict(map(read_sizes, options.sizes))}.items():
        for seq_len in lengths_to_try(name):
            print(row(name, np.asarray(lengths, np.int64), seq_len), flush=True)


def genomes() -> dict[str, np.ndarray | tuple[int, ...]]:
    """Contigs' lengths by name; what is drawn is drawn alike every time."""
    rng = np.random.default_rng(0)
    viruses = rng.integers(5_000, 30_001, 1000)
    assembly = np.exp(rng.normal(np.log(12_000), 1.0, 11_239)).astype(np.int64)
    return {"1,000 viruses": viruses, "yeast": YEAST, "draft assembly": assembly, "hg38": HG38}


def lengths_to_try(name: str) -> tuple[int, ...]:
    return {
        "1,000 viruses": (8192, 32_768),
        "draft assembly": (8192, 131_072),
        "hg38": (1024, 131_072, 1 << 20),
    }.get(name, (8192, 131_072))


def read_sizes(text: str) -> tuple[str, list[int]]:
    name, _, path = text.partition("=")
    return name, [int(split_fields(line)[1]) for _, line in read_lines(path)]


def row(name: str, lengths: np.ndarray, seq_len: int) -> str:
    """A line of the table; shares are of all bases, those of contigs below 1,024 included."""
    table = windows_of(lengths)
    total = int(lengths.sum())
    plain, packed = (CropTable([table], seq_len, 0, pack=pack) for pack in (False, True))
    moved = shifted(plain, len(table.windows))
    seen = [int(plain.bases_of_source[0]), *moved, int(packed.bases_of_source[0])]
    shares = " | ".join(f"{bases / total:.2%}" for bases in seen)
    return f"| {name} | {len(lengths):,} | {total:,} | {seq_len:,} | {shares} |"


def windows_of(lengths: np.ndarray) -> WindowTable:
    """The windows that sharding at its defaults makes of contigs without N."""
    ends = np.cumsum(lengths)
    of_contigs = tile(np.stack([ends - lengths, ends], axis=1), PlanOptions())
    windows = np.zeros(len(of_contigs), WINDOW_DTYPE)
    windows["length"] = windows["acgt"] = of_contigs[:, 1] - of_contigs[:, 0]
    windows["shard"] = np.arange(len(windows)) // WINDOWS_OF_A_SHARD
    shards = [Shard(f"{number}.tar", 0, "") for number in range(int(windows["shard"][-1]) + 1)]
    return WindowTable("s", ("c",), (int(ends[-1]),), shards, LoadedWindows(windows, np.zeros(0, WINDOW_RUN_DTYPE)))


def shifted(crops: CropTable, window_count: int) -> tuple[int, int]:
    """Bases that the crops of an epoch hold, the mean of some, and those that any of these epochs holds."""
    offsets = np.random.default_rng(1).integers(0, crops.seq_len, EPOCHS).tolist()
    tilings = [crops.shifted(0, offset) for offset in offsets]
    mean = np.mean([tiling.bases(np.array([0, window_count]))[0] for tiling in tilings])
    lengths = crops.windows["length"].astype(np.int64)
    first = np.cumsum(lengths) - lengths
    places = (tiling.locate(np.arange(tiling.size)) for tiling in tilings)
    start = np.sort(np.concatenate([first[window] + begin for window, begin, _ in places]))
    if not len(start):
        return 0, 0
    return round(float(mean)), int(np.minimum(np.diff(start, append=start[-1] + crops.seq_len), crops.seq_len).sum())


if __name__ == "__main__":
    sys.exit(main())
