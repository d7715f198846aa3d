"""Baselines for a fine-tuned model on the same split: linear models of k-mers and of embeddings.

Imports no torch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from caduceus.alphabet import reverse_complement
from caduceus.evaluate.columns import package
from caduceus.evaluate.labelled import Task
from caduceus.evaluate.metrics import is_better, measure

_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverses of the penalty, of which validation chooses one."""
_K = 5
_DIGIT = np.full(256, 4, dtype=np.int64)
_DIGIT[np.frombuffer(b"ACGT", np.uint8)] = range(4)


def kmer_counts(sequences: list[np.ndarray], k: int = _K) -> np.ndarray:
    """Shares of each k-mer on both strands, (n, 4 ** k) float32; k-mers with other codes than ACGT are left out."""
    rows = np.zeros((len(sequences), 4**k), dtype=np.float32)
    for row, bases in zip(rows, sequences, strict=True):
        for strand in (bases, reverse_complement(bases)):
            if len(strand) >= k:
                digits = np.lib.stride_tricks.sliding_window_view(_DIGIT[strand], k)
                words = digits[(digits < 4).all(1)] @ (4 ** np.arange(k))
                row += np.bincount(words, minlength=4**k)
        row /= max(row.sum(), 1)
    return rows


def fit_linear(
    task: Task, metric: str, train: tuple[np.ndarray, np.ndarray], valid: tuple[np.ndarray, np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a logistic or ridge regression on standardised features (n, F); validation chooses the penalty.

    Returns a function: features (n, F) -> probabilities (n, classes), or values (n,).
    """
    linear, pipeline = package("sklearn.linear_model"), package("sklearn.pipeline")
    scale = package("sklearn.preprocessing").StandardScaler
    best, best_value = None, None
    for strength in _STRENGTHS:
        if task.classes is None:
            model = linear.Ridge(alpha=1 / strength)
        else:
            model = linear.LogisticRegression(C=strength, max_iter=300)
        if task.several:
            model = package("sklearn.multiclass").OneVsRestClassifier(model)
        fitted = pipeline.make_pipeline(scale(), model).fit(*train)

        def predict(features: np.ndarray, fitted: Any = fitted) -> np.ndarray:
            if task.classes is None:
                return fitted.predict(features)
            if task.several:
                return fitted.predict_proba(features)
            outputs = np.zeros((len(features), len(task.classes)))
            outputs[:, fitted.classes_] = fitted.predict_proba(features)
            return outputs

        value = measure(task, valid[1], predict(valid[0]))[metric]
        if best is None or is_better(metric, value, best_value):
            best, best_value = predict, value
    return best
