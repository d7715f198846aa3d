"""Every verb on two ranks that are killed in the middle and started again: as one process that nothing befell."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from caduceus.evaluate.columns import read_columns
from caduceus.evaluate.finetune import finetune
from caduceus.evaluate.labelled import LabelledTable
from caduceus.evaluate.model import Runner
from tests.conftest import write_random_fasta
from tests.distributed.ranks import start_ranks
from tests.evaluate.test_finetune import options, write_table
from tests.evaluate.test_finetune_ranks import told_by_ranks

MANY = 12_400
"""Sequences, or variants, that are four parts or more: two of each rank."""


def write_sequences(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list("ACGT"), 8)) for _ in range(MANY)]
    (folder / "in.csv").write_text("\n".join(["sequence", *rows]) + "\n")
    return folder / "in.csv"


def write_variants(folder: Path, kind: str) -> tuple[Path, Path]:
    """(variants, genome): a substitution at each of many places."""
    write_random_fasta(folder / "genome.fa", 0, {"chr1": MANY})
    text = "".join((folder / "genome.fa").read_text().upper().split("\n")[1:])
    rows = [(n + 1, base, "A" if base != "A" else "C") for n, base in enumerate(text[: MANY // 2]) if base in "ACGT"]
    if kind == "vcf":
        lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
        lines += [f"chr1\t{pos}\t.\t{ref}\t{alt}\t.\t.\t." for pos, ref, alt in rows]
    else:
        lines = ["chrom,pos,ref,alt", *(f"chr1,{pos},{ref},{alt}" for pos, ref, alt in rows)]
    (folder / f"in.{kind}").write_text("\n".join(lines) + "\n")
    return folder / f"in.{kind}", folder / "genome.fa"


def embed(folder: Path, model: Path) -> list[object]:
    return ["embed", "--model", model, "--input", write_sequences(folder)]


def variants(kind: str) -> Callable[[Path, Path], list[object]]:
    def words(folder: Path, model: Path) -> list[object]:
        path, genome = write_variants(folder, kind)
        return ["variants", "--model", model, "--input", path, "--genome", genome, "--window", 8]

    return words


def every_snv(folder: Path, model: Path) -> list[object]:
    _, genome = write_variants(folder, "csv")
    (folder / "places.bed").write_text("chr1\t0\t2600\n")
    return ["variants", "--model", model, "--every-snv", folder / "places.bed", "--genome", genome, "--window", 8]


def predict(folder: Path, model: Path) -> list[object]:
    train = LabelledTable(write_table(folder / "train.csv", 0, 12, ["0", "1"]))
    quick = options(fit={"epochs": 1})
    finetune(Runner(model), {"train": train}, folder / "tuned", quick, lambda line: None)
    return ["predict", "--model", folder / "tuned" / "model", "--input", write_sequences(folder)]


def probe(folder: Path, model: Path) -> list[object]:
    rng = np.random.default_rng(0)
    rows = [f"{''.join(rng.choice(list('ACGT'), 8))},{n % 2}" for n in range(MANY)]
    (folder / "train.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")
    return ["probe", "--model", model, "--train", folder / "train.csv"]


VERBS = {
    "out.npz": embed,
    "out.parquet": embed,
    "out.zarr": embed,
    "out.vcf.gz": variants("vcf"),
    "scored.tsv": variants("csv"),
    "snvs.csv": every_snv,
    "predicted.parquet": predict,
    "probe.json": probe,
}


def content(path: Path) -> object:
    """What a file of results holds, to be compared."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files}
    if path.suffix == ".zarr":
        group = zarr.open_group(str(path), mode="r")
        return np.asarray(group["embeddings"]).tobytes(), list(group.attrs["names"])
    if path.suffix == ".parquet":
        return read_columns(path).values
    return path.read_bytes()


def kill_after(words: list[str], there: Callable[[], bool]) -> None:
    """Start the command on two ranks, and kill both as soon as something of it is `there`."""
    ranks = start_ranks([[sys.executable, "-m", "caduceus.evaluate", *words]] * 2)
    deadline = time.monotonic() + 300
    while not there() and time.monotonic() < deadline and all(rank.poll() is None for rank in ranks):
        time.sleep(0.002)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_two_ranks_that_were_killed_give_what_one_process_gives(
    name: str, tmp_path: Path, model_folder, evaluate
) -> None:
    words = VERBS[name](tmp_path, model_folder("ps"))
    (tmp_path / "one").mkdir()
    one, two = tmp_path / "one" / name, tmp_path / name
    evaluate(*words, "--out", one)
    given, parts = [*map(str, words), "--out", str(two)], tmp_path / f"{name}.parts"
    kill_after(given, lambda: any(parts.glob("*.npz")))
    assert not two.exists()
    told = told_by_ranks([sys.executable, *given])
    assert "parts are there already" in told and told.count(f"{two}: ") >= 2 and told.count("written") <= 1
    assert content(one) == content(two)
    assert sorted(path.name for path in tmp_path.glob(f"{name}*")) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )


@pytest.mark.slow
def test_held_out_losses_of_two_ranks_are_those_of_one(
    tmp_path: Path, small_shards: Path, model_folder, evaluate, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "c.yaml").write_text(
        f"data: {{path: {small_shards}, seq_len: 256}}\ntrain: {{global_batch: 4, micro_batch: 2, precision: fp32}}\n"
        "valid: {samples: 12}\nrun: {device: cpu}\nmodel: {d_model: 8, n_layer: 2}\n"
    )
    words = ["heldout", "--export", model_folder("ps"), "--config", tmp_path / "c.yaml"]
    evaluate(*words)
    one = json.loads(capsys.readouterr().out)
    told = told_by_ranks([sys.executable, *map(str, words)])
    two = json.loads(told[told.index("{") : told.rindex("}") + 1])  # printed once
    assert one["valid_loss"] > 0 and one.keys() == two.keys()
    exact = [name for name in one if "rc_disagreement" not in name]  # which is of the first batch of each rank
    assert {name: two[name] for name in exact} == pytest.approx({name: one[name] for name in exact}, rel=1e-6)
    assert two["valid_rc_disagreement"] < 1e-4


@pytest.mark.slow
def test_a_suite_that_fine_tunes_on_two_ranks_goes_on_after_a_kill(tmp_path: Path, model_folder, evaluate) -> None:
    data = tmp_path / "data" / "tf" / "0"
    data.mkdir(parents=True)
    for seed, split in enumerate(("train", "dev", "test")):
        write_table(data / f"{split}.csv", seed, 24, ["0", "1"])
    words = ["suite", "--model", model_folder("ps"), "--suite", "gue", "--data", tmp_path / "data", "--tasks", "tf_0"]
    words += ["--seeds", 2, "--epochs", 2, "--lr", 0.01, "--batch-size", 8]
    evaluate(*words, "--out", tmp_path / "one")
    given = [*map(str, words), "--out", str(tmp_path / "two")]
    kill_after(given, lambda: any((tmp_path / "two").rglob("full-1.json")))
    (rows,) = (tmp_path / "two").rglob("runs/full-1/metrics.jsonl")
    fitted, written = rows.read_bytes(), rows.stat().st_mtime_ns
    told = told_by_ranks([sys.executable, *given])
    assert told.count("tf_0: mcc") == 1
    assert (rows.read_bytes(), rows.stat().st_mtime_ns) == (fitted, written), "the first seed was fitted again"
    one, two = (json.loads((tmp_path / out / "suite.json").read_bytes())["tasks"][0] for out in ("one", "two"))
    # Gradients are summed over ranks in another order, in fp32; a label that it turns would move mcc by 0.04 or more.
    assert one.keys() == two.keys() and two["mean"] == pytest.approx(one["mean"], abs=1e-6)
