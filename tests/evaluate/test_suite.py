"""Suites on folders laid out as users of each benchmark have them, end to end."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from caduceus.errors import UserError
from caduceus.evaluate import suite_finetuned
from caduceus.evaluate.labelled import Task
from caduceus.evaluate.metrics import bootstrap_interval, measure
from caduceus.evaluate.model import Runner
from caduceus.evaluate.suite import SuiteRequest, load_suite, run_suite
from caduceus.evaluate.suite_data import find_task_data
from caduceus.evaluate.suite_page import write_page
from caduceus.presets import presets
from tests.conftest import write_random_fasta
from tests.evaluate.conftest import made

QUICK = {"seeds": 1, "epochs": 1, "lr": [0.01, 0.02], "batch_size": 16}


def rows_of(count: int, seed: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return [("".join(rng.choice(list("ACGT"), 20)), str(number % 2)) for number in range(count)]


def as_csv(rows: list[tuple[str, str]]) -> str:
    return "sequence,label\n" + "".join(f"{sequence},{label}\n" for sequence, label in rows)


def write_parquet(path: Path, rows: list[tuple[str, str]], **columns: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sequences, labels = ([row[n] for row in rows] for n in (0, 1))
    names = [f"s|{n}" for n in range(len(rows))]
    pyarrow.parquet.write_table(
        pyarrow.table({"sequence": sequences, "name": names, "label": list(map(int, labels)), **columns}), path
    )


TRAIN, TEST = rows_of(40, 0), rows_of(20, 1)


def write_layout(folder: Path, layout: str) -> tuple[list[str], Path | None]:
    """A task of TRAIN and TEST in a layout: names to look for, and the genome."""
    if layout == "parquet by task":
        for split, rows in (("train", TRAIN), ("test", TEST)):
            half = len(rows) // 2
            write_parquet(folder / f"H3/{split}-00000-of-00002.parquet", rows[:half])
            write_parquet(folder / f"H3/{split}-00001-of-00002.parquet", rows[half:])
    elif layout == "one parquet of all tasks":
        for split, rows in (("train", TRAIN), ("test", TEST)):
            both = [*rows, *rows_of(5, 9)]
            write_parquet(folder / f"{split}.parquet", both, task=["H3"] * len(rows) + ["H4"] * 5)
    elif layout == "fna":
        for split, rows in (("train", TRAIN), ("test", TEST)):
            (folder / "H3").mkdir(exist_ok=True)
            text = "".join(f">chr{n}|{label}\n{s[:12]}\n{s[12:]}\n" for n, (s, label) in enumerate(rows))
            (folder / f"H3/{split}.fna").write_text(text)
    elif layout == "csv":
        (folder / "gue_H3").mkdir()
        for split, rows in (("train", TRAIN), ("dev", TEST), ("test", TEST)):
            (folder / f"gue_H3/{split}.csv.gz").write_bytes(gzip.compress(as_csv(rows).encode()))
        return ["EMP/H3", "gue_H3"], None
    else:
        genome = "".join(sequence for sequence, _ in TRAIN + TEST)
        (folder / "genome.fa").write_text(f">1\n{genome}\n")
        for split, rows, first in (("train", TRAIN, 0), ("test", TEST, len(TRAIN))):
            (folder / "H3" / split).mkdir(parents=True)
            for label in "01":
                lines = ["id,region,start,end,strand"]
                for n, row in enumerate(rows):
                    if row[1] == label:
                        lines.append(f"{n},chr1,{20 * (first + n)},{20 * (first + n + 1)},{'+-'[n % 4 // 2]}")
                lines.append("99,chr2,0,20,+")
                path = folder / "H3" / split / f"{label}.csv.gz"
                path.write_bytes(gzip.compress("\n".join(lines).encode()))
        return ["H3"], folder / "genome.fa"
    return ["H3"], None


@pytest.mark.parametrize("layout", ["parquet by task", "one parquet of all tasks", "fna", "csv", "places"])
def test_each_layout_holds_the_same(layout: str, tmp_path: Path) -> None:
    names, genome = write_layout(tmp_path, layout)
    found = find_task_data(tmp_path, names, tmp_path / "out" / "H3", genome)
    task = Task(("0", "1"))
    for split, rows in (("train", TRAIN), ("test", TEST)):
        data = found.tables[split].labelled(task)
        mine = [(bases.tobytes().decode(), str(label)) for bases, label in zip(data.bases, data.labels, strict=True)]
        if layout == "places":
            turned = str.maketrans("ACGT", "TGCA")
            rows = [(s[::-1].translate(turned) if n % 4 // 2 else s, label) for n, (s, label) in enumerate(rows)]
            assert sorted(mine) == sorted(rows)
        else:
            assert mine == rows
    assert ("valid" in found.tables) == (layout == "csv")
    assert len(found.notes) == (2 if layout == "places" else 0)
    assert find_task_data(tmp_path, ["nothing"], tmp_path / "out" / "x", genome) is None


@pytest.mark.slow
def test_a_suite_runs_what_is_there_and_names_what_is_missing(
    tmp_path: Path, model_folder, evaluate, capsys: pytest.CaptureFixture
) -> None:
    write_layout(tmp_path, "parquet by task")
    copy = TRAIN[0][0][::-1].translate(str.maketrans("ACGT", "TGCA"))
    write_parquet(tmp_path / "H3/test-00002-of-00002.parquet", [(TRAIN[1][0], "1"), (copy, "0")])
    words = ["suite", "--model", model_folder("ps"), "--suite", "nt", "--data", tmp_path, "--out", tmp_path / "out"]
    words += ["--tasks", "H3", "H4", "--seeds", 1, "--epochs", 1, "--lr", 0.01, "--batch-size", 16]
    evaluate(*words)
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "suite.json").read_bytes())
    row, missing = result["tasks"]
    assert missing["task"] == "H4" and "huggingface.co" in missing["missing"]
    assert row["copies"] == {"test": [1, 1]} and row["published"]["Caduceus-PS"] == [0.799, 0.029]
    assert row["interval"][0] <= row["mean"] <= row["interval"][1] and row["on"] == "test"
    assert "1 sequences of test also occur in train, 1 as reverse complement" in said
    html = (tmp_path / "out" / "suite.html").read_text()
    assert "<svg" in html and "0.799 ± 0.029" in html and "H4 is missing" in html
    evaluate(*words)
    assert "is there already" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "suite.json").read_bytes()) == result


@pytest.mark.slow
def test_a_suite_that_was_killed_goes_on_and_keeps_what_is_best_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path, "csv")
    (tmp_path / "mine.yaml").write_text(
        "title: Mine\nsource: here\nexpects: a folder\nprotocol: {epochs: 1, lr: [0.01, 0.02], batch_size: 16, "
        "weight_decay: 0.1, seeds: 1, pool: mean}\ntasks:\n  H3: {folders: [gue_H3], metric: auroc}\n"
    )
    suite, runner = load_suite(tmp_path / "mine.yaml"), Runner(made("ps", torch.float32))
    real, calls = suite_finetuned.finetune, []

    def dying(*arguments: object) -> dict:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        result = real(*arguments)
        result["results"]["full"][0]["valid"]["auroc"] = arguments[3].fit.lr  # the higher rate is the better one
        return result

    monkeypatch.setattr(suite_finetuned, "finetune", dying)
    with pytest.raises(KeyboardInterrupt):
        run_suite(runner, suite, SuiteRequest(tmp_path), tmp_path / "out")
    said: list[str] = []
    (row,) = run_suite(runner, suite, SuiteRequest(tmp_path), tmp_path / "out", said.append)
    assert row["lr"] == 0.02 and sum("is there already" in line for line in said) == 1


def test_every_suite_loads_and_names_metrics_that_there_are() -> None:
    assert {"nt", "gue", "gb", "lrb", "traitgym", "plantcad"} <= set(presets("suite"))
    for name, words in presets("suite").items():
        assert words and load_suite(name).tasks
    published = {task.name: task.published for task in load_suite("nt").tasks}
    assert len(published) == 18 and all(len(models) == 6 for models in published.values())
    assert published["splice_sites_donors"]["Caduceus-PS"] == (0.874, 0.289)


def test_an_interval_covers_what_it_is_of() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    p = np.clip(labels * 0.4 + rng.random(400) * 0.6, 0, 1)
    outputs, task = np.stack([1 - p, p], 1), Task(("0", "1"))
    low, high = bootstrap_interval(task, "accuracy", labels, outputs)
    middle = measure(task, labels, outputs)["accuracy"]
    spread = np.sqrt(middle * (1 - middle) / 400)
    assert low < middle < high and high - low == pytest.approx(2 * 1.96 * spread, rel=0.25)


@pytest.mark.moderate
def test_mistakes_end_in_one_line(tmp_path: Path, model_folder, refused) -> None:
    (tmp_path / "bad.yaml").write_text("title: x\n")
    (tmp_path / "data" / "dummy_mouse_enhancers_ensembl" / "train").mkdir(parents=True)
    places = tmp_path / "data" / "dummy_mouse_enhancers_ensembl" / "train" / "a.csv"
    places.write_text("id,region,start,end,strand\n1,chr1,0,999,+\n")
    write_random_fasta(tmp_path / "genome.fa", 0, {"chr1": 50})
    words = ["suite", "--model", model_folder("ps"), "--out", tmp_path / "out", "--data", tmp_path / "data"]
    for more, message in {
        ("--suite", "none"): "--suite: there is no suite 'none'; there are",
        ("--suite", tmp_path / "bad.yaml"): "bad.yaml: not a suite",
        ("--suite", "nt"): "has none of the tasks; it should hold a folder for each task",
        ("--suite", "nt", "--tasks", "H9"): "--tasks: nt has no task 'H9', but H3",
        ("--suite", "nt", "--data", tmp_path / "no"): "is not a folder",
        ("--suite", "gb"): "holds places of a genome; give its file with --genome",
        (
            "--suite",
            "gb",
            "--genome",
            tmp_path / "genome.fa",
        ): "ends beyond chr1 with 50 bases; it may be for another assembly",
    }.items():
        assert message in refused(*words, *more), more


@pytest.mark.parametrize(
    "row, message",
    [
        ("1,NC_9,0,9,+", "its places lie on contigs such as 'NC_9', but GENOME has chr1; it may be another genome"),
        ("1,chr1,0,9.5,+", "a.csv:2: end must be a whole number in plain digits, got '9.5'"),
        ("1,chr1,9,9,+", "a.csv:2: end should be after start, got 9 and 9"),
    ],
)
def test_places_that_cannot_be_read_are_named(row: str, message: str, tmp_path: Path) -> None:
    folder, genome = tmp_path / "data" / "a" / "train", tmp_path / "genome.fa"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text(f"id,region,start,end,strand\n{row}\n")
    write_random_fasta(genome, 0, {"chr1": 50})
    with pytest.raises(UserError) as caught:
        find_task_data(tmp_path / "data", ["a"], tmp_path / "out" / "a", genome)
    assert message.replace("GENOME", str(genome)) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_page_names_an_address_once_for_all_tasks_that_are_missing(tmp_path: Path) -> None:
    rows = [{"task": name, "metric": "mcc", "missing": "https://there (a folder)"} for name in ("H3", "H4")]
    write_page(tmp_path / "suite.html", "NT", None, rows)
    html = (tmp_path / "suite.html").read_text()
    assert html.count("https://there") == 1 and "H3, H4 are missing: https://there (a folder)" in html
