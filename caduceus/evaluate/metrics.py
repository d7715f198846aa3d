"""The metrics of the field, by scikit-learn and scipy. Imports no torch."""

import warnings

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.columns import package
from caduceus.evaluate.labelled import Task

CLASSIFICATION = ("mcc", "f1", "accuracy", "auroc", "auprc")
REGRESSION = ("pearson", "spearman", "r2", "mse")
SMALLER_IS_BETTER = ("mse",)


def names_of(task: Task) -> tuple[str, ...]:
    """The metrics of a task, the first of them its own."""
    return REGRESSION if task.classes is None else CLASSIFICATION


def check_metric(metric: str | None, task: Task) -> str:
    """The metric to choose by, the task's own where none is given."""
    names = names_of(task)
    if metric is not None and metric not in names:
        raise UserError(f"--metric: choose one of {', '.join(names)}, got {metric!r}")
    return metric or names[0]


def measure(task: Task, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """All metrics of a task. outputs: probabilities (n, classes), or values (n,).

    F1 is that of the second class where there are two, else the mean over classes; AUROC and AUPRC are those of the
    second class, or means over each class against the others. NaN where the labels are too few to define one.
    """
    if task.classes is None:
        stats = package("scipy.stats")
        error = float(np.mean((labels - outputs) ** 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that all values are the same: the result says so, as NaN
            pearson, spearman = (float(f(labels, outputs).statistic) for f in (stats.pearsonr, stats.spearmanr))
        spread = float(np.var(labels))
        return {
            "pearson": pearson,
            "spearman": spearman,
            "r2": 1 - error / spread if spread else float("nan"),
            "mse": error,
        }
    metrics = package("sklearn.metrics")
    chosen = outputs.argmax(1)
    binary = len(task.classes) == 2
    found = {
        "mcc": metrics.matthews_corrcoef(labels, chosen),
        "f1": metrics.f1_score(labels, chosen, average="binary" if binary else "macro", zero_division=0),
        "accuracy": metrics.accuracy_score(labels, chosen),
    }
    areas = []
    for number in (1,) if binary else range(len(task.classes)):
        of_class = labels == number
        if 0 < of_class.sum() < len(labels):
            scores = outputs[:, number]
            areas.append((metrics.roc_auc_score(of_class, scores), metrics.average_precision_score(of_class, scores)))
    auroc, auprc = np.mean(areas, 0) if areas else (np.nan, np.nan)
    return {name: float(value) for name, value in {**found, "auroc": auroc, "auprc": auprc}.items()}


def is_better(metric: str, new: float, old: float | None) -> bool:
    """Whether a value of a metric is better than an earlier one; NaN never is, and anything is better than NaN."""
    if old is None or np.isnan(old):
        return old is None or not np.isnan(new)
    return new < old if metric in SMALLER_IS_BETTER else new > old
