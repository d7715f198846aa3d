"""Several values for a sequence, and labels that are lists."""

from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.errors import UserError
from caduceus.evaluate.columns import read_columns, write_columns
from caduceus.evaluate.examples import WithLoss, label_tensors
from caduceus.evaluate.finetune import finetune
from caduceus.evaluate.labelled import LabelledTable, Task, find_task
from caduceus.evaluate.metrics import measure
from caduceus.evaluate.model import Runner
from caduceus.evaluate.predict import Predictor
from tests.evaluate.conftest import made
from tests.evaluate.test_finetune import gc_rich, options


def write_lists(path: Path, seed: int, count: int) -> LabelledTable:
    """Shares of G or C, and of A, on scales of their own, and a third value that is the same everywhere."""
    rng = np.random.default_rng(seed)
    texts = [gc_rich(rng, rng.random()) for _ in range(count)]
    labels = [[100 + 20 * sum(b in "GC" for b in t) / len(t), -t.count("A") / len(t), 7.0] for t in texts]
    write_columns(path, {"sequence": texts, "labels": labels})
    return LabelledTable(path)


@pytest.mark.moderate
def test_several_values_are_learnt_each_in_its_scale(tmp_path: Path) -> None:
    tables = {name: write_lists(tmp_path / f"{name}.parquet", n, 60) for n, name in enumerate(("train", "test"))}
    runner = Runner(made("ps", torch.float32))
    chosen = options(metric="r2", probe=True, baselines=("kmer", "cnn"), fit={"epochs": 8})
    result = finetune(runner, tables, tmp_path / "out", chosen)
    for method in ("full", "probe", "kmer", "cnn"):
        assert result["summary"][method]["spearman"]["mean"] > 0.6, method
    predictor = Predictor(tmp_path / "out" / "model")
    task = predictor.model.task
    assert task.values == ("1", "2", "3") and task.spread[2] == 1
    test = tables["test"].labelled(task)
    outputs = predictor.predict(test.bases)
    found = measure(task, test.labels, outputs)
    assert found == pytest.approx(result["results"]["full"][0]["test"], abs=1e-5)
    alone = [measure(Task(None), test.labels[:, n], outputs[:, n])["pearson"] for n in (0, 1)]
    assert found["pearson"] == pytest.approx(np.mean(alone))  # the third has none
    written = read_columns(tmp_path / "out" / "predictions.tsv").values
    assert list(written) == [f"{what}_{n}" for what in ("label", "prediction") for n in (1, 2, 3)]
    assert np.array(written["prediction_1"], dtype=float) == pytest.approx(outputs[:, 0], rel=1e-5)


def test_the_loss_is_the_mean_squared_error_of_scaled_values() -> None:
    task = Task(None, (1.0, 10.0), (2.0, 5.0), values=("a", "b"))
    labels, weights = label_tensors(task, np.array([[3.0, 0.0], [1.0, 10.0]]))
    net = torch.nn.Identity()
    found = WithLoss(net, task)(torch.tensor([[0.5, -1.0], [2.0, 0.0]]), labels, weights)
    assert found.loss_sum.tolist() == [0.25 + 1.0, 4.0] and found.weight_sum.tolist() == [2, 2]


def test_columns_text_and_lists_say_the_same(tmp_path: Path) -> None:
    sequences = ["AC", "AG", "AT"]
    write_columns(tmp_path / "list.parquet", {"sequence": sequences, "label": [[1, 0.5], [2, 1], [0, 4]]})
    (tmp_path / "text.tsv").write_text("sequence\tlabel\nAC\t1 0.5\nAG\t2 1\nAT\t0,4\n")
    (tmp_path / "columns.csv").write_text("sequence,x,y\nAC,1,0.5\nAG,2,1\nAT,0,4\n")
    write_columns(tmp_path / "binary.parquet", {"sequence": sequences, "labels": [[1, 0], [1, 1], [0, 0]]})
    tables = [LabelledTable(tmp_path / name) for name in ("list.parquet", "text.tsv")]
    tables.append(LabelledTable(tmp_path / "columns.csv", label="x,y"))
    tasks = [find_task(table, "regression") for table in tables]
    assert [task.values for task in tasks] == [("1", "2"), ("1", "2"), ("x", "y")]
    labels = [table.labelled(task).labels.tolist() for table, task in zip(tables, tasks, strict=True)]
    assert labels == [[[1, 0.5], [2, 1], [0, 4]]] * 3 and find_task(tables[0], "auto") == tasks[0]
    binary = LabelledTable(tmp_path / "binary.parquet")
    task = find_task(binary, "auto")
    assert task == Task(("1", "2"), several=True) and binary.labelled(task).labels.tolist() == [[1, 0], [1, 1], [0, 0]]
    for values, kind, message in (
        ([[1, 2.5], [1], [0, 4]], "auto", "row 2: has 1 labels, and the first sequence of training 2"),
        ([[1, 2.5], [1, None], [0, 4]], "auto", "row 2: the label of a regression must be a number, got 'None'"),
        ([[1, 2.5], [1, 2.5], [1, 2.5]], "regression", "all sequences have the same labels"),
        ([[1, 0], [1, 2], [0, 1]], "multilabel", "row 2: label 2 must be 0 or 1, got '2'"),
    ):
        write_columns(tmp_path / "bad.parquet", {"sequence": sequences, "label": values})
        with pytest.raises(UserError, match=message):
            bad = LabelledTable(tmp_path / "bad.parquet")
            bad.labelled(find_task(bad, kind))
