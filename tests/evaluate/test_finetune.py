"""Fine-tuning learns what is there to learn, goes on after a kill, and its result predicts as it was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.alphabet import reverse_complement
from caduceus.evaluate.adapters import ADAPTED
from caduceus.evaluate.baselines import kmer_counts
from caduceus.evaluate.classifier import Cnn, SequenceModel
from caduceus.evaluate.columns import read_columns
from caduceus.evaluate.embed import EmbedOptions, embed
from caduceus.evaluate.examples import ExampleLoader, Examples
from caduceus.evaluate.finetune import FinetuneOptions, finetune
from caduceus.evaluate.fitting import FitOptions
from caduceus.evaluate.labelled import Labelled, LabelledTable, Task, copies, split_off
from caduceus.evaluate.metrics import is_better, measure
from caduceus.evaluate.model import Runner
from caduceus.evaluate.predict import Predictor
from caduceus.evaluate.results import table_of
from caduceus.hub import load
from caduceus.monitor.__main__ import main as monitor_main
from caduceus.run.directory import RunDirectory
from caduceus.train import loop
from tests.evaluate.conftest import made

TWO, TWO_NAMED = Task(("0", "1")), Task(("poor", "rich"))


def gc_rich(rng: np.random.Generator, label: float) -> str:
    share = 0.25 + 0.5 * label
    p = [(1 - share) / 2, share / 2, share / 2, (1 - share) / 2]
    return "".join(rng.choice(list("ACGT"), int(rng.integers(30, 50)), p=p))


def write_table(path: Path, seed: int, count: int, labels: list[str] | None) -> Path:
    """GC-rich and GC-poor sequences; without labels, values that say how rich."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        number = int(rng.integers(len(labels))) if labels else rng.random()
        scale = max(len(labels) - 1, 1) if labels else 1
        rows.append(f"{gc_rich(rng, number / scale)},{labels[number] if labels else 10 + 3 * number}")
    path.write_text("sequence,label\n" + "\n".join(rows) + "\n")
    return path


def tables(folder: Path, labels: list[str] | None) -> dict[str, LabelledTable]:
    return {
        name: LabelledTable(write_table(folder / f"{name}.csv", seed, count, labels))
        for seed, (name, count) in enumerate((("train", 40), ("test", 24)))
    }


def options(**values) -> FinetuneOptions:
    fit = FitOptions(**{"epochs": 5, "lr": 0.02, "batch_size": 16, **values.pop("fit", {})})
    return FinetuneOptions(fit=fit, **values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ps", "ph"])
def test_classes_are_learnt_and_predicted_as_measured(kind: str, tmp_path: Path) -> None:
    given = tables(tmp_path, ["poor", "rich"])
    runner = Runner(made(kind, torch.float32))
    before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    said: list[str] = []
    chosen = options(probe=True, baselines=("random", "cnn", "kmer"), seeds=2)
    result = finetune(runner, given, tmp_path / "out", chosen, said.append)
    assert [line.split()[0] for line in table_of(result).split("\n")[1:]] == ["full", "probe", "random", "cnn", "kmer"]
    for method in ("full", "probe", "kmer"):
        assert result["summary"][method]["auroc"]["mean"] > 0.9, method
    assert ("conjoined in training" if kind == "ps" else "forward in training") in said[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in runner.model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model",
        "predictions.tsv",
        "result.json",
        "runs",
    ]
    assert json.loads((tmp_path / "out/result.json").read_bytes())["summary"] == result["summary"]
    predictor = Predictor(tmp_path / "out" / "model")
    test = given["test"].labelled(predictor.model.task)
    outputs = predictor.predict(test.bases)
    best = result["results"]["full"][result["seed_of_model"] - 1]
    assert measure(predictor.model.task, test.labels, outputs) == pytest.approx(best["test"], abs=1e-6)
    written = read_columns(tmp_path / "out" / "predictions.tsv").values
    assert np.array(written["p_rich"], dtype=float) == pytest.approx(outputs[:, 1], abs=1e-6)
    other = predictor.predict([reverse_complement(bases) for bases in test.bases])
    assert other == pytest.approx(outputs, abs=1e-5)


@pytest.mark.moderate
def test_values_are_learnt_in_their_scale(tmp_path: Path) -> None:
    result = finetune(Runner(made("ps", torch.float32)), tables(tmp_path, None), tmp_path / "out", options(probe=True))
    assert result["task"]["classes"] is None and result["metric"] == "pearson"
    for method, least in (("full", 0.8), ("probe", 0.7)):  # a probe has the features of a model that never trained
        found = result["summary"][method]
        assert found["pearson"]["mean"] > least and found["mse"]["mean"] < 0.75 * 0.75, method


@pytest.mark.moderate
def test_a_frozen_model_trains_its_head_alone(tmp_path: Path) -> None:
    given = tables(tmp_path, ["1", "2", "10"])
    runner = Runner(made("ph", torch.float32))
    result = finetune(runner, given, tmp_path / "out", options(frozen=True, fit={"epochs": 20, "class_weights": True}))
    assert result["task"]["classes"] == ["1", "2", "10"] and result["summary"]["frozen"]["auroc"]["mean"] > 0.8
    model = SequenceModel.load(tmp_path / "out" / "model")
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, runner.model.state_dict()[name])
    outputs = Predictor(tmp_path / "out" / "model").predict(given["test"].labelled(model.task).bases)
    written = read_columns(tmp_path / "out" / "predictions.tsv").values
    assert np.array(written["p_10"], dtype=float) == pytest.approx(outputs[:, 2], abs=1e-5)


@pytest.mark.moderate
def test_a_command_that_was_killed_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, runner = tables(tmp_path, ["0", "1"]), Runner(made("ps", torch.float32))
    chosen = options(seeds=2, fit={"epochs": 3})
    whole = finetune(runner, given, tmp_path / "whole", chosen)
    real, steps = loop.training_step, []

    def dying(*arguments: object, **handed: object) -> dict:
        steps.append(1)
        if len(steps) == 15:  # in the second epoch of the second seed; 36 sequences are 3 steps
            raise KeyboardInterrupt
        return real(*arguments, **handed)

    monkeypatch.setattr(loop, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        finetune(runner, given, tmp_path / "out", chosen)
    assert not (tmp_path / "out" / "result.json").exists()
    again = finetune(runner, given, tmp_path / "out", chosen)
    assert len(steps) == 15 + 6 and again["results"] == whole["results"]
    rows = [RunDirectory(tmp_path / name / "runs/full-2").metrics() for name in ("whole", "out")]
    assert [[row.get("loss") for row in of] for of in rows] == [[row.get("loss") for row in rows[0]]] * 2
    assert len(rows[0]) == 12 and rows[0][3]["step"] == 3 and "valid_mcc" in rows[0][3]


@pytest.mark.moderate
def test_training_ends_early_where_nothing_improves(tmp_path: Path) -> None:
    given, runner = tables(tmp_path, ["0", "1"]), Runner(made("ps", torch.float32))
    chosen = options(metric="accuracy", fit={"epochs": 30, "patience": 2, "lr": 1e-12})
    (result,) = finetune(runner, given, tmp_path / "out", chosen)["results"]["full"]
    assert (result["best_epoch"], result["epochs"]) == (1, 3)


@pytest.mark.moderate
def test_the_best_epoch_is_kept_or_the_last_where_none_can_be_told(tmp_path: Path) -> None:
    runner, given = Runner(made("ps", torch.float32)), tables(tmp_path, None)
    both = {"train": given["train"], "valid": given["test"]}
    (result,) = finetune(runner, both, tmp_path / "out", options(fit={"epochs": 8, "lr": 0.3}))["results"]["full"]
    assert result["best_epoch"] < result["epochs"] == 8
    model = SequenceModel.load(tmp_path / "out" / "model")
    held = both["valid"].labelled(model.task)
    outputs = Predictor(tmp_path / "out" / "model").predict(held.bases)
    assert measure(model.task, held.labels, outputs)["pearson"] == pytest.approx(result["valid"]["pearson"], abs=1e-5)
    one = {**both, "valid": LabelledTable(write_table(tmp_path / "one.csv", 3, 1, None))}
    (result,) = finetune(runner, one, tmp_path / "two", options(fit={"epochs": 2}))["results"]["full"]
    assert result["best_epoch"] == 2 and result["valid"]["pearson"] is None


@pytest.mark.parametrize("pool", ["mean", "max", "centre", "middle:2:9"])
@pytest.mark.parametrize("kind", ["ps", "ph"])
def test_a_sequence_gives_the_same_whatever_is_beside_it(kind: str, pool: str) -> None:
    rng = np.random.default_rng(0)
    sequences = [np.frombuffer(gc_rich(rng, 0.5)[:n].encode(), np.uint8) for n in (5, 30, 12)]
    runner = Runner(made(kind))
    model = SequenceModel(runner.model, TWO, pool).double().eval()
    with torch.no_grad():
        together = model(sequences)
        for row, bases in enumerate(sequences):
            assert together[row].numpy() == pytest.approx(model([bases])[0].numpy(), abs=1e-12)
        features = torch.from_numpy(embed(runner, sequences, EmbedOptions(pool=pool, strands="concatenate")))
        expected = model.head(features.unflatten(1, (2, -1))).mean(1)
        assert together.numpy() == pytest.approx(expected.numpy(), abs=1e-12)
        cnn = Cnn(TWO).double().eval()
        alone = torch.cat([cnn([bases]) for bases in sequences])
        assert cnn(sequences).numpy() == pytest.approx(alone.numpy(), abs=1e-12)


@pytest.mark.moderate
def test_micro_batches_add_up_to_their_batch(tmp_path: Path) -> None:
    given, runner = tables(tmp_path, ["0", "1"]), Runner(made("ps"))
    losses = [
        finetune(runner, given, tmp_path / f"{size}", options(fit={"epochs": 1, "batch_bases": size, "lr": 1e-4}))
        for size in (40, 4000)
    ]
    one, other = (result["results"]["full"][0]["valid"]["auroc"] for result in losses)
    assert one == pytest.approx(other, abs=1e-9)
    weights = [SequenceModel.load(tmp_path / f"{size}" / "model").state_dict() for size in (40, 4000)]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-7), name


@pytest.mark.moderate
def test_a_fit_is_a_run_that_is_watched_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given, runner = tables(tmp_path, ["0", "1"]), Runner(made("ps", torch.float32))
    finetune(runner, given, tmp_path / "out", options(fit={"epochs": 4, "lr": 1e-3}))
    run = tmp_path / "out/runs/full-1"
    rates = [row["lr"] for row in RunDirectory(run).metrics() if "loss" in row]
    assert rates == pytest.approx(1e-4 + 9e-4 * (1 + np.cos(np.pi * np.arange(12) / 12)) / 2)  # 1 % of 12 steps is none
    assert not (run / "checkpoints").exists()
    monkeypatch.setattr("sys.argv", ["monitor", str(run)])
    assert monitor_main() == 0 and "full-1: step 12/12  loss" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["monitor", str(run), "--report", str(tmp_path / "report.html")])
    assert monitor_main() == 0 and "<svg" in (tmp_path / "report.html").read_text()


def test_examples_come_once_an_epoch_whatever_the_ranks() -> None:
    examples = Examples(list(range(11)), [0] * 11, [3, 9, 3, 3, 3, 9, 3, 3, 3, 3, 3])
    taken = {}
    for world in (1, 2, 3):
        loaders = [ExampleLoader(examples, TWO, 4, 12, 7, torch.device("cpu"), rank, world) for rank in range(world)]
        streams = [iter(loader) for loader in loaders]
        for step in range(6):  # of 4, 4 and 3 examples, twice
            batches = [[next(it) for _ in range(loader.per_step)] for it, loader in zip(streams, loaders, strict=True)]
            rows = [row for of in batches for batch in of if batch.weights.any() for row in batch.inputs]
            assert taken.setdefault(step, sorted(rows)) == sorted(rows)
            assert len({loader.samples_consumed for loader in loaders}) == 1
            assert sum(batch.label_weight() for of in batches for batch in of) == len(rows)
            assert all(
                max(map(examples.sizes.__getitem__, b.inputs)) * len(b.inputs) <= 12 for of in batches for b in of
            )
        ahead = ExampleLoader(examples, TWO, 4, 12, 7, torch.device("cpu"))
        ahead.load_state({"samples_consumed": 15})
        assert sorted(row for _ in range(ahead.per_step) for row in next(iter(ahead)).inputs)[0] in taken[4]
    assert sorted([*taken[0], *taken[1], *taken[2]]) == list(range(11)) and taken[0] != taken[3]


@pytest.mark.moderate
@pytest.mark.parametrize("kind", ["ps", "ph"])
def test_adapters_are_low_rank_and_merge_into_the_model(kind: str, tmp_path: Path) -> None:
    given, runner = tables(tmp_path, ["poor", "rich"]), Runner(made(kind, torch.float32))
    result = finetune(runner, given, tmp_path / "out", options(lora=1, fit={"epochs": 8}))
    assert result["methods"] == ["lora"] and result["summary"]["lora"]["auroc"]["mean"] > 0.9
    merged = load(tmp_path / "out/model").state_dict()
    changed = 0
    for name, before in runner.model.state_dict().items():
        moved = merged[name] - before
        if name.rpartition(".")[2] in ADAPTED:
            ranks = torch.linalg.matrix_rank(moved, atol=1e-6)
            changed += int(ranks.sum())
            assert ranks.max() <= 1, name
        else:
            assert not moved.any(), name
    assert changed > 0
    outputs = Predictor(tmp_path / "out/model").predict(given["test"].labelled(TWO_NAMED).bases)
    written = read_columns(tmp_path / "out" / "predictions.tsv").values
    assert np.array(written["p_rich"], dtype=float) == pytest.approx(outputs[:, 1], abs=1e-5)


def test_words_are_counted_on_both_strands() -> None:
    text = "ACGTNACGG"
    counts = kmer_counts([np.frombuffer(text.encode(), np.uint8)], k=2)[0]
    other = reverse_complement(np.frombuffer(text.encode(), np.uint8)).tobytes().decode()
    words = [strand[i : i + 2] for strand in (text, other) for i in range(len(text) - 1)]
    words = [word for word in words if "N" not in word]
    assert counts.sum() == pytest.approx(1)
    for word in set(words):
        number = sum("ACGT".index(base) * 4**place for place, base in enumerate(word))
        assert counts[number] == pytest.approx(words.count(word) / len(words))


def test_copies_between_splits_are_counted() -> None:
    train, test = (
        [np.frombuffer(text, np.uint8) for text in texts] for texts in ((b"ACC", b"TTT"), (b"ACC", b"GGT", b"AAC"))
    )
    assert copies(train, test) == (1, 1)
    data = Labelled(train * 10, np.arange(20))
    rest, part = split_off(data, 0.1, seed=1)
    assert sorted([*rest.labels, *part.labels]) == list(range(20)) and len(part) == 2
    assert not np.array_equal(part.labels, split_off(data, 0.1, seed=2)[1].labels)


def test_metrics_are_those_of_the_field() -> None:
    labels, p = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9])
    found = measure(TWO, labels, np.stack([1 - p, p], 1))
    assert found == pytest.approx({"mcc": 0, "f1": 0.5, "accuracy": 0.5, "auroc": 0.75, "auprc": 5 / 6})
    one_class = measure(TWO, labels * 0, np.stack([1 - p, p], 1))
    assert np.isnan(one_class["auroc"]) and one_class["accuracy"] == 0.5
    values = measure(Task(None), np.array([1.0, 2, 3]), np.array([1.0, 2, 4]))
    assert values == pytest.approx({"pearson": 0.98198051, "spearman": 1, "r2": 0.5, "mse": 1 / 3})
    assert is_better("mse", 1, 2) and is_better("mcc", 2, 1) and not is_better("mcc", np.nan, 1)
    assert is_better("mcc", 0, np.nan) and is_better("mcc", 0, None) and not is_better("mcc", np.nan, None)


def test_predict_takes_any_file_of_sequences(tmp_path: Path, evaluate) -> None:
    SequenceModel(made("ps", torch.float32), TWO, "mean").save(tmp_path / "model", {})
    (tmp_path / "in.fa").write_text(">a\nACGTACGT\n>b\nGGGG\n")
    evaluate("predict", "--model", tmp_path / "model", "--input", tmp_path / "in.fa", "--out", tmp_path / "out.tsv")
    found = read_columns(tmp_path / "out.tsv").values
    assert found["name"] == ["a", "b"] and list(found) == ["name", "prediction", "p_0", "p_1"]


@pytest.mark.moderate
def test_mistakes_end_in_one_line(tmp_path: Path, model_folder, refused) -> None:
    good = write_table(tmp_path / "good.csv", 0, 10, ["0", "1"])
    files = {
        "label.csv": (
            "sequence,class\nA,1\n",
            [],
            "no column 'label' for the labels (--label); it has sequence, class",
        ),
        "text.csv": ("sequence,label\nA,x\nC,y\n", ["--task", "regression"], "text.csv:2: the label of a regression"),
        "one.csv": ("sequence,label\nA,1\nC,1\n", [], "all labels are '1'; there is nothing to learn"),
        "hole.csv": ("sequence,label\nA,1\nC,\n", [], "hole.csv:3: the label is missing"),
        "long.csv": ("sequence,label\nA,1\nCCCC,0\n", ["--longest", "3"], "long.csv:3: the sequence has 4 bases, more"),
        "empty.csv": ("", [], "holds no line"),
        "same.csv": ("sequence,label\nA,1\nC,1\n", ["--task", "regression"], "all labels are 1; there is nothing"),
    }
    for name, (content, words, message) in files.items():
        (tmp_path / name).write_text(content)
        words = ["finetune", "--model", model_folder("ps"), "--train", tmp_path / name, *words]
        assert message in refused(*words, "--out", tmp_path / "out"), name
    (tmp_path / "new.csv").write_text("sequence,label\nA,2\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    command = ["finetune", "--model", model_folder("ps"), "--train", good, "--out", tmp_path / "out"]
    for words, message in {
        ("--test", tmp_path / "new.csv"): "new.csv:2: label '2' does not occur in training: 0, 1",
        ("--baseline", "svm"): "--baseline: choose from random, cnn, kmer, got 'svm'",
        ("--metric", "r2"): "--metric: choose one of mcc",
        ("--pool", "base"): "--pool: choose one of mean, max, centre",
        ("--task", "both"): "--task: choose one of auto",
        ("--seeds", "0"): "--seeds: must be at least 1",
        ("--epochs", "0"): "--epochs: must be at least 1",
        ("--lr", "0"): "--lr: must be above 0",
        ("--valid-share", "1"): "--valid-share: must be between 0 and 1",
        ("--out", tmp_path / "full"): "holds other files; choose a new folder",
    }.items():
        assert message in refused(*command, *words), words
    assert not (tmp_path / "out").exists()
    assert "not a fine-tuned model" in refused("predict", "--model", tmp_path, "--input", good, "--out", "x.tsv")
