"""The usual metrics, computed with scikit-learn and scipy. Imports no torch."""

import warnings
from collections.abc import Callable, Iterable

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.columns import package
from caduceus.evaluate.labelled import Task

CLASSIFICATION = ("mcc", "f1", "accuracy", "auroc", "auprc")
REGRESSION = ("pearson", "spearman", "r2", "mse")
SMALLER_IS_BETTER = ("mse",)


def names_of(task: Task) -> tuple[str, ...]:
    """The names of the metrics of a task; the first is its default."""
    return REGRESSION if task.classes is None else CLASSIFICATION


def check_metric(metric: str | None, task: Task) -> str:
    """The metric for choosing: the given one, or the task's default. Raises `UserError` for an unknown one."""
    names = names_of(task)
    if metric is not None and metric not in names:
        raise UserError(f"--metric: choose one of {', '.join(names)}, got {metric!r}")
    return metric or names[0]


def measure(
    task: Task, labels: np.ndarray, outputs: np.ndarray, names: Iterable[str] | None = None
) -> dict[str, float]:
    """The metrics `names` of a task, or all. outputs: probabilities (n, classes), or values, (n,) or (n, values).

    With several labels or values they are means over these. Outputs without a label are ignored. F1 is that of the
    second class where there are two, else the mean over classes. AUROC and AUPRC are those of the second class, or
    means over each class against the others. NaN where there are too few labels to define a metric.
    """
    if task.several:
        both = [np.stack([1 - p, p], 1) for p in outputs.T]
        two = Task(("0", "1"))
        each = [measure(two, label.astype(np.int64), of, names) for label, of in zip(labels.T, both, strict=True)]
        return {name: _mean([found[name] for found in each]) for name in each[0]}
    if task.values:
        each = [measure(Task(None), label, output, names) for label, output in zip(labels.T, outputs.T, strict=True)]
        return {name: _mean([found[name] for found in each]) for name in each[0]}
    if task.per_base:
        there = np.isfinite(labels) if task.classes is None else labels >= 0
        labels, outputs = labels[there], outputs[there]
        labels = labels if task.classes is None else labels.astype(np.int64)
    of = _of_values(labels, outputs) if task.classes is None else _of_classes(len(task.classes), labels, outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about undefined metrics, which the result shows as NaN
        return {name: float(of[name]()) for name in names or names_of(task)}


def _mean(values: list[float]) -> float:
    """The mean of the defined values; NaN if there is none."""
    there = [value for value in values if not np.isnan(value)]
    return float(np.mean(there)) if there else np.nan


def _of_values(labels: np.ndarray, outputs: np.ndarray) -> dict[str, Callable[[], float]]:
    stats = package("scipy.stats")
    error, spread, several = np.mean((labels - outputs) ** 2), np.var(labels), len(labels) > 1
    return {
        "pearson": lambda: stats.pearsonr(labels, outputs).statistic if several else np.nan,
        "spearman": lambda: stats.spearmanr(labels, outputs).statistic if several else np.nan,
        "r2": lambda: 1 - error / spread if spread else np.nan,
        "mse": lambda: error,
    }


def _of_classes(classes: int, labels: np.ndarray, outputs: np.ndarray) -> dict[str, Callable[[], float]]:
    metrics = package("sklearn.metrics")
    chosen, binary = outputs.argmax(1), classes == 2

    def area(of_scores: Callable[[np.ndarray, np.ndarray], float]) -> float:
        numbers = [n for n in ((1,) if binary else range(classes)) if 0 < (labels == n).sum() < len(labels)]
        return np.mean([of_scores(labels == n, outputs[:, n]) for n in numbers]) if numbers else np.nan

    return {
        "mcc": lambda: metrics.matthews_corrcoef(labels, chosen),
        "f1": lambda: metrics.f1_score(labels, chosen, average="binary" if binary else "macro", zero_division=0),
        "accuracy": lambda: metrics.accuracy_score(labels, chosen),
        "auroc": lambda: area(metrics.roc_auc_score),
        "auprc": lambda: area(metrics.average_precision_score),
    }


def bootstrap_interval(
    task: Task, metric: str, labels: np.ndarray, outputs: np.ndarray, rounds: int = 200
) -> tuple[float, float]:
    """95 % bootstrap interval of a metric over the examples; NaN where it is not defined."""
    return interval_of(lambda rows: measure(task, labels[rows], outputs[rows], [metric])[metric], len(labels), rounds)


def interval_of(statistic: Callable[[np.ndarray], float], count: int, rounds: int = 200) -> tuple[float, float]:
    """95 % bootstrap interval of a statistic of rows (n,) out of `count`; NaN where it is not defined."""
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(count, size=count)) for _ in range(rounds)]
    low, high = np.nanpercentile(values, (2.5, 97.5)) if not np.isnan(values).all() else (np.nan, np.nan)
    return float(low), float(high)


RANKINGS = ("auroc", "auprc", "auroc_by_chrom", "auprc_by_chrom")


def ranking(metric: str, labels: np.ndarray, scores: np.ndarray, groups: np.ndarray | None = None) -> float:
    """How well scores rank positives (labels true) above the others, by one of `RANKINGS`; NaN where there is only one
    class.

    Metrics by chromosome (`groups`) are means over those with both classes, weighted by their number of variants.
    """
    of = {"auroc": "roc_auc_score", "auprc": "average_precision_score"}[metric.partition("_")[0]]
    area = getattr(package("sklearn.metrics"), of)
    if not metric.endswith("_by_chrom"):
        groups = np.zeros(len(labels), dtype=np.int64)
    parts = list(_by_group(labels, scores, groups))
    if not parts:
        return np.nan
    return float(np.average([area(*part) for part in parts], weights=[len(part[0]) for part in parts]))


def _by_group(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray | None
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    for group in np.unique(groups):
        rows = groups == group
        if 0 < labels[rows].sum() < rows.sum():
            yield labels[rows], scores[rows]


def is_better(metric: str, new: float | None, old: float | None) -> bool:
    """Whether a value of a metric is better than an earlier one; `old` is None where there is no earlier one.

    NaN (None in JSON) is never better, and any number is better than NaN.
    """
    if new is None or np.isnan(new):
        return False
    if old is None or np.isnan(old):
        return True
    return new < old if metric in SMALLER_IS_BETTER else new > old
