"""Makes an index's rows for the runs of non-ACGT bases."""

import numpy as np

from caduceus.data.format import MIN_RUN, RUN_DTYPE
from data_prep.plan.composition import non_acgt_runs


def listed_runs(bases: bytes) -> np.ndarray:
    """Runs of `MIN_RUN` or more non-ACGT bases, (n, 2) int64."""
    runs = non_acgt_runs(np.frombuffer(bases, np.uint8))
    return runs[runs[:, 1] - runs[:, 0] >= MIN_RUN]


def reverse_runs(runs: np.ndarray, length: int) -> np.ndarray:
    """The same runs in the reverse complement of `length` bases, in ascending order."""
    return length - runs[::-1, ::-1]


def run_table(sample: int, runs: np.ndarray) -> np.ndarray:
    """Rows of an index (RUN_DTYPE) for the runs of one sample."""
    rows = np.empty(len(runs), dtype=RUN_DTYPE)
    rows["sample"], rows["start"], rows["length"] = sample, runs[:, 0], runs[:, 1] - runs[:, 0]
    return rows
