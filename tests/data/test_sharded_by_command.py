"""What data_prep/shard_genome.py writes reads back as the genome, and as what the tests' own writer writes."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.alphabet import IGNORE_LABEL, encode
from caduceus.config import Config
from caduceus.data import ShardedGenome, build_loader
from data_prep.shard_genome import main as shard_genome
from tests.data.shard_fixture import Species, complement_string, random_bases, write_dataset

OPTIONS = ["--window", "2000", "--min-window", "300", "--cut-gaps", "500", "--min-acgt", "0", "--shard-bytes", "64KiB"]


@pytest.fixture(scope="module")
def contigs() -> dict[str, str]:
    rng = np.random.default_rng(0)
    gapped = (
        random_bases(rng, 7_000) + "N" * 900 + random_bases(rng, 3_000, "ACGTRYN") + "n" * 40 + random_bases(rng, 900)
    )
    return {"chr1": random_bases(rng, 11_111), "chr2": gapped, "chr3.1": random_bases(rng, 4_000)}


def write_shards(directory: Path, contigs: dict[str, str], *options: str) -> Path:
    fasta = directory / "genome.fa"
    fasta.write_text(
        "".join(f">{name}\n" + re.sub("(.{70})", r"\1\n", bases) + "\n" for name, bases in contigs.items())
    )
    command = ["--fasta", str(fasta), "--species", "toy", "--out", str(directory / "shards"), "--workers", "1"]
    assert not shard_genome([*command, *OPTIONS, *options])
    return directory / "shards"


@pytest.mark.parametrize("strands", ["both", "forward", "random"])
def test_windows_and_bases_are_the_genome(contigs: dict[str, str], tmp_path: Path, strands: str) -> None:
    shards = write_shards(tmp_path, contigs, "--strands", strands, "--valid-contigs", "chr3.1")
    genome = ShardedGenome(shards)
    rng = np.random.default_rng(1)
    covered = {name: np.zeros(len(bases), int) for name, bases in contigs.items()}
    windows: dict[str, list] = {}
    for split in ("train", "valid"):
        table = genome.table("toy", split)
        for window in table.windows:
            name, start, length = table.contigs[window["contig"]], int(window["start"]), int(window["length"])
            covered[name][start : start + length] += 1
            windows.setdefault(split, []).append((name, start, start + length))
            first, last = sorted(rng.choice(np.arange(start, start + length + 1), 2, replace=False).tolist())
            assert genome.read("toy", name, first, last).tobytes().decode() == contigs[name][first:last]
            other = genome.read("toy", name, first, last, "-").tobytes().decode()
            assert other == complement_string(contigs[name][first:last])
    for name, count in covered.items():  # every base once, but for the long gap
        assert set(count.tolist()) <= {0, 1}
        left_out = {base for base, times in zip(contigs[name], count, strict=True) if not times}
        assert left_out == ({"N"} if name == "chr2" else set())
    # the other writer, given these windows, leads to the same table of runs
    other = write_dataset(tmp_path / "other", [Species("toy", contigs, windows)])
    for split in ("train", "valid"):
        mine, theirs = genome.table("toy", split), ShardedGenome(other).table("toy", split)
        assert sorted(run_place(mine, run) for run in mine.runs) == sorted(
            run_place(theirs, run) for run in theirs.runs
        )


def run_place(table: object, run: np.void) -> tuple[str, int, int]:
    window = table.windows[run["window"]]
    return table.contigs[window["contig"]], int(window["start"]) + int(run["start"]), int(run["length"])


@pytest.mark.parametrize("strands", ["both", "forward", "random"])
def test_batches_do_not_depend_on_the_stored_strands(
    configure: Callable[..., Config], contigs: dict[str, str], tmp_path: Path, strands: str
) -> None:
    loader = build_loader(configure(path=str(write_shards(tmp_path, contigs, "--strands", strands))))
    for batch in itertools.islice(loader, 40):
        for row, g in enumerate(batch.g.tolist()):
            where = loader.describe(g)
            bases = contigs[where["contig"]][where["start"] : where["end"]]
            shown = complement_string(bases) if where["strand"] == "-" else bases
            truth = torch.from_numpy(encode(np.frombuffer(shown.encode(), np.uint8))).long()
            labels = batch.labels[row]
            assert torch.equal(torch.where(labels == IGNORE_LABEL, batch.input_ids[row], labels), truth)
