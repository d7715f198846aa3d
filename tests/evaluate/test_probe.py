"""A linear probe finds what embeddings tell, and is that of scikit-learn on them."""

import json
from pathlib import Path

import numpy as np
import pytest

from caduceus.evaluate.embed import EmbedOptions, embed
from caduceus.evaluate.labelled import LabelledTable, split_off
from caduceus.evaluate.metrics import CLASSIFICATION
from caduceus.evaluate.model import Runner
from caduceus.evaluate.probe import ProbeOptions, probe, read_tables
from tests.evaluate.conftest import made


def write(path: Path, seed: int, count: int) -> Path:
    """Sequences rich in G and C, and others."""
    rng = np.random.default_rng(seed)
    rows = [("ACGT", [0.15, 0.35, 0.35, 0.15], "rich"), ("ACGT", [0.35, 0.15, 0.15, 0.35], "poor")]
    lines = ["sequence,label"]
    for number in range(count):
        letters, p, label = rows[number % 2]
        lines.append("".join(rng.choice(list(letters), 40, p=p)) + f",{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.moderate
def test_it_is_a_linear_model_of_the_embeddings(tmp_path: Path, model_folder, evaluate, capsys) -> None:
    files = {name: write(tmp_path / f"{name}.csv", seed, 60) for seed, name in enumerate(("train", "test"))}
    out = tmp_path / "probe.json"
    words = ["--train", files["train"], "--test", files["test"], "--layer", 1, "--out", out]
    evaluate("probe", "--model", model_folder("ps"), *words)
    written = json.loads(out.read_text())
    assert set(written["metrics"]) == {"valid", "test"} and tuple(written["metrics"]["test"]) != ()
    assert set(written["metrics"]["test"]) == set(CLASSIFICATION) and written["metrics"]["test"]["auroc"] > 0.9
    assert f"auroc {written['metrics']['test']['auroc']:.4f}" in capsys.readouterr().out
    assert not out.with_name("probe.json.parts").exists()

    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tables = {name: LabelledTable(path) for name, path in files.items()}
    _, _, data = read_tables(tables, ProbeOptions())
    runner, options = Runner(model_folder("ps")), EmbedOptions(layer=1, strands="concatenate")
    of = {name: embed(runner, part.bases, options) for name, part in data.items()}
    found = []
    for strength in (0.001, 0.01, 0.1, 1.0, 10.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
        model.fit(of["train"], data["train"].labels)
        found.append(roc_auc_score(data["test"].labels, model.predict_proba(of["test"])[:, 1]))
    auroc = written["metrics"]["test"]["auroc"]  # of one of the penalties, by the bits of its embeddings
    assert min(abs(one - auroc) for one in found) < 1e-6


def test_validation_is_split_from_train_where_none_is_given(tmp_path: Path) -> None:
    table = LabelledTable(write(tmp_path / "train.csv", 0, 20))
    _, metric, data = read_tables({"train": table}, ProbeOptions(valid_share=0.25))
    assert metric == "mcc" and (len(data["train"]), len(data["valid"])) == (15, 5)
    _, valid = split_off(table.labelled(read_tables({"train": table}, ProbeOptions())[0]), 0.25, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(valid.bases, data["valid"].bases, strict=True))
    result = probe(Runner(made("ph")), {"train": table}, tmp_path / "out.json")
    assert list(result["metrics"]) == ["valid"]


def test_mistakes_end_in_one_line(tmp_path: Path, model_folder, refused) -> None:
    train = write(tmp_path / "train.csv", 0, 20)
    words = ["probe", "--model", model_folder("ps"), "--train", train, "--out", tmp_path / "out.json"]
    for more, message in {
        ("--pool", "base"): "--pool: choose one of mean, max, centre",
        ("--layer", "9"): "--layer: the model has 0",
        ("--valid-share", "1"): "--valid-share: must be between 0 and 1",
        ("--metric", "r2"): "--metric: choose one of mcc",
        ("--label", "class"): "no column 'class' for the labels (--label); it has sequence, label",
        ("--task", "regression"): "train.csv:2: the label of a regression must be a number, got 'rich'",
    }.items():
        assert message in refused(*words, *more), more
