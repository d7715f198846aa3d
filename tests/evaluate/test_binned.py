"""Values of many tracks in bins, read from the files of the CAGE task: what they are, and a model that learns them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.alphabet import reverse_complement
from caduceus.errors import UserError
from caduceus.evaluate.binned import BinnedTable
from caduceus.evaluate.classifier import Cnn, SequenceModel
from caduceus.evaluate.finetune import finetune
from caduceus.evaluate.labelled import split_off
from caduceus.evaluate.metrics import measure
from caduceus.evaluate.model import Runner
from caduceus.evaluate.predict import Predictor
from caduceus.evaluate.suite import SuiteRequest, load_suite, run_suite
from caduceus.evaluate.suite_data import find_task_data
from tests.conftest import write_random_fasta
from tests.evaluate.conftest import made, text_of
from tests.evaluate.test_finetune import options

BINS, BIN = 4, 8


def gc(text: str) -> int:
    return text.count("G") + text.count("C")


def write_cage(folder: Path, train: int = 24, test: int = 8) -> Path:
    """The files of the task for a small genome, which is returned; values count G or C in a bin, and others."""
    genome = folder / "genome.fa"
    folder.mkdir(parents=True, exist_ok=True)
    write_random_fasta(genome, 3, {"chr1": 2_000})
    genome.write_text(genome.read_text() + ">chr2\n" + "N" * 60 + "\n")
    text, lines = text_of(genome)["chr1"], [",chrom,start,stop,split,npy_idx"]
    targets = folder / "cage_prediction" / "targets_subset"
    targets.mkdir(parents=True)
    for split, word, count, first in (
        ("train", "train", train, 0),
        ("validation", "valid", 3, 40),
        ("test", "test", test, 50),
    ):
        arrays = {}
        for number in range(count):
            start = (first + number) * BINS * BIN
            bins = [text[start + n * BIN :][:BIN] for n in range(BINS)]
            arrays[f"target-{word}-{number}"] = np.array([[[gc(b), 10.0 * (BIN - gc(b))] for b in bins]], np.float32)
            lines.append(f"{len(lines)},chr1,{start + 1},{start + 1 + BINS * BIN},{split},{number}")
        half = count // 2
        for low, high in ((0, half), (half, count)):
            kept = {name: array for name, array in arrays.items() if low <= int(name.rpartition("-")[2]) < high}
            np.savez(targets / f"targets-{word}-{low}-{high - 1}.npz", **kept)
    lines += ["90,chr2,1,33,train,0", "91,chr9,1,33,train,1", "92,chr1,1,33,train,99"]
    (folder / "cage_prediction" / "sequences_coordinates.csv").write_text("\n".join(lines) + "\n")
    return genome


def table_of(folder: Path, split: str = "train") -> BinnedTable:
    genome = write_cage(folder) if not folder.exists() else folder / "genome.fa"
    return BinnedTable(str(folder / "cage_prediction" / "sequences_coordinates.csv"), split, str(genome))


def test_sequences_and_values_are_those_of_the_files(tmp_path: Path) -> None:
    genome = write_cage(tmp_path)
    found = find_task_data(tmp_path, ["cage_prediction"], tmp_path / "out", genome)
    assert {name: len(table) for name, table in found.tables.items()} == {"train": 24, "valid": 3, "test": 8}
    assert [note.partition(": ")[2].partition(",")[0] for note in found.notes] == [
        "1 sequences of train lie on contigs that the genome lacks",
        "1 sequences of train lie on files not there",
        "1 sequences of train lie on stretches of N",
    ]
    task = found.tables["train"].task("regression")
    assert task.bin == BIN and task.per_base and task.values == ("1", "2")
    text, all_values = text_of(genome)["chr1"], []
    data = found.tables["train"].labelled(task)
    for row, (bases, labels) in enumerate(zip(data.bases, data.labels, strict=True)):
        expected = text[row * BINS * BIN : (row + 1) * BINS * BIN]
        assert bases.tobytes().decode() == expected and data.sizes[row] == len(expected)
        bins = [expected[n : n + BIN] for n in range(0, len(expected), BIN)]
        all_values += [np.log1p([gc(b), 10 * (BIN - gc(b))]) for b in bins]
        assert labels == pytest.approx(np.array(all_values[-BINS:]), rel=1e-6)
    assert task.mean == pytest.approx(np.mean(all_values, 0)) and task.spread == pytest.approx(np.std(all_values, 0))
    rest, part = split_off(data, 0.25, 1)
    assert (len(rest), len(part)) == (18, 6)
    assert {b.tobytes() for b in rest.bases} | {b.tobytes() for b in part.bases} == {b.tobytes() for b in data.bases}


@pytest.mark.parametrize("kind", ["ps", "ph"])
def test_a_bin_is_the_mean_of_its_bases_on_both_strands(kind: str, tmp_path: Path) -> None:
    task = table_of(tmp_path / "cage").task("regression")
    data, runner = table_of(tmp_path / "cage").labelled(task), Runner(made(kind))
    net = SequenceModel(runner.model, task, "mean").double().eval()
    short, long = data.bases[0][: 2 * BIN], data.bases[1]
    with torch.no_grad():
        for of in (net, Cnn(task).double().eval()):
            together = of([short, long])
            assert together.shape == (2, BINS, 2)
            assert together[0, :2].numpy() == pytest.approx(of([short])[0].numpy(), abs=1e-12)
            turned = of([reverse_complement(long)])[0].flip(0)
            assert together[1].numpy() == pytest.approx(turned.numpy(), abs=1e-12)
        held = runner.states(runner.ids(long)[None], runner.config.n_layer)[:, 0]
        means = held.unflatten(1, (BINS, BIN)).mean(2)
        if kind == "ps":
            assert net([long])[0].numpy() == pytest.approx(net.head(means).mean(0).numpy(), abs=1e-12)


@pytest.mark.slow
def test_values_of_bins_are_learnt_and_predicted_again(tmp_path: Path) -> None:
    tables = {split: table_of(tmp_path / "cage", split) for split in ("train", "valid", "test")}
    runner = Runner(made("ps", torch.float32))
    result = finetune(runner, tables, tmp_path / "out", options(metric="r2", fit={"epochs": 10, "batch_size": 4}))
    assert result["summary"]["full"]["r2"]["mean"] > 0.6
    predictor = Predictor(tmp_path / "out" / "model")
    task = predictor.model.task
    data = tables["test"].labelled(task)
    outputs = predictor.predict(list(data.bases))
    with np.load(tmp_path / "out" / "predictions.npz") as arrays:
        assert arrays["labels"] == pytest.approx(np.stack(list(data.labels)))
        assert arrays["predictions"].reshape(-1, 2) == pytest.approx(outputs, abs=1e-5)
    found = measure(task, np.concatenate(list(data.labels)), outputs)
    assert found == pytest.approx(result["results"]["full"][0]["test"], abs=1e-5)
    with pytest.raises(UserError, match="a sequence has 9 bases; this model takes multiples of 8, its bin"):
        predictor.predict([data.bases[0][:9]])


@pytest.mark.moderate
def test_the_suite_has_the_task(tmp_path: Path) -> None:
    genome = write_cage(tmp_path)
    quick = {"seeds": 1, "epochs": 1, "lr": 0.01, "batch_size": 8}
    request, said = SuiteRequest(tmp_path, ["cage_prediction"], genome, quick), list[str]()
    (row,) = run_suite(Runner(made("ps", torch.float32)), load_suite("lrb"), request, tmp_path / "out", said.append)
    assert row["metric"] == "r2" and row["on"] == "test" and row["interval"][0] <= row["mean"] <= row["interval"][1]
    assert any("regression of 2 values, by 8 bases, 24 train, 3 valid, 8 test" in line for line in said)
    with pytest.raises(UserError, match="holds places of a genome; give its file with --genome"):
        find_task_data(tmp_path, ["cage_prediction"], tmp_path / "x", None)


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "cage"
    table_of(folder)
    targets = folder / "cage_prediction" / "targets_subset"
    for arrays, message in (
        ({"target-train-0": np.zeros((1, 5, 2))}, r"target-train-0 should hold values .* has the shape \(1, 5, 2\)"),
        ({"target-train-1": np.zeros((1, 4, 2))}, "target-train-0 cannot be read"),
    ):
        np.savez(targets / "targets-train-0-11.npz", **arrays)
        with pytest.raises(UserError, match=message):
            table_of(folder).task("regression")
    (targets / "targets-train-0-11.npz").write_bytes(b"PK\3\4 cut short")
    with pytest.raises(UserError, match=r"11\.npz: target-train-0 cannot be read"):
        table_of(folder).task("regression")
    coordinates = folder / "cage_prediction" / "sequences_coordinates.csv"
    lines = coordinates.read_text().splitlines()
    for line, message in (
        ("1,chr1,x,33,train,0", "csv:2: start, stop and npy_idx must be whole numbers, got 'x'"),
        ("1,chr1,1990,2030,train,0", "csv:2: ends beyond chr1 with 2,000 bases; it may be for another assembly"),
    ):
        coordinates.write_text("\n".join([lines[0], line]) + "\n")
        with pytest.raises(UserError, match=message):
            len(table_of(folder))
