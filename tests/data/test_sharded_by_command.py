"""What data_prep/shard_genome.py writes reads back as the genome, and as what the tests' own writer writes."""

import itertools
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.alphabet import CADUCEUS, IGNORE_LABEL
from caduceus.config import Config
from caduceus.data import ShardedGenome, build_loader
from caduceus.errors import UserError
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
            truth = torch.from_numpy(CADUCEUS.encode(np.frombuffer(shown.encode(), np.uint8))).long()
            labels = batch.labels[row]
            assert torch.equal(torch.where(labels == IGNORE_LABEL, batch.input_ids[row], labels), truth)


@pytest.mark.moderate
@pytest.mark.parametrize("strands", ["forward", "random"])
@pytest.mark.parametrize("stride", ["2000", "700"])
def test_padding_is_never_read_as_the_genome(
    contigs: dict[str, str], tmp_path: Path, configure: Callable[..., Config], strands: str, stride: str
) -> None:
    """Segments end at contig ends, at a gap, at an excluded interval and in N of the genome."""
    bases = contigs["chr1"]
    contigs = {**contigs, "chr1": bases[:5_990] + "N" * 10 + bases[6_000:6_100] + bases[6_100:-3] + "NNN"}
    (tmp_path / "excluded.bed").write_text("chr1\t6000\t6100\n")
    options = [
        "--strands",
        strands,
        "--stride",
        stride,
        "--tail",
        "pad",
        "--exclude-bed",
        str(tmp_path / "excluded.bed"),
    ]
    shards = write_shards(tmp_path, contigs, *options)
    held = held_intervals(shards)
    genome = ShardedGenome(shards)
    edges = {name: sorted({edge for one, *both in held if one == name for edge in both}) for name in contigs}
    rng = np.random.default_rng(0)
    refused = 0
    for name in contigs:
        for _ in range(600):
            start, end = (int(rng.choice(edges[name]) + rng.integers(-20, 20) * rng.integers(0, 2)) for _ in range(2))
            if any(one == name and first <= start < end <= last for one, first, last in held):
                assert genome.read("toy", name, start, end).tobytes().decode() == contigs[name][start:end]
            else:
                refused += 1
                with pytest.raises(UserError, match="no window"):
                    genome.read("toy", name, start, end)
    assert refused > 100
    loader = build_loader(configure(path=str(shards), seq_len=100, strands="forward", min_acgt=0.0))
    partial = 0
    for batch in itertools.islice(loader, 200):
        for row, g in enumerate(batch.g.tolist()):
            where = loader.describe(g)
            bases = contigs[where["contig"]][where["start"] : where["end"]].ljust(100, "N")
            truth = torch.from_numpy(CADUCEUS.encode(np.frombuffer(bases.encode(), np.uint8))).long()
            labels = batch.labels[row]
            assert torch.equal(torch.where(labels == IGNORE_LABEL, batch.input_ids[row], labels), truth)
            partial += where["end"] - where["start"] < 100
    assert partial


def held_intervals(shards: Path) -> set[tuple[str, int, int]]:
    """Contig, start and end of the windows, as the tars describe them."""
    held = set()
    for path in shards.glob("*/*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    meta = json.load(tar.extractfile(member))
                    held.add((meta["contig"], meta["start"], meta["end"]))
    return held
