"""Two-sided k-mer context models: baselines for a masked-base model.

A base is predicted from the k bases on either side of it, by counting. Neighbours that the input hides are summed over,
which is exact: the table has a fifth symbol, HIDDEN, whose count is the sum over A, C, G and T. A narrower model is
then the same table with the outer neighbours hidden.

Bases are codes: A, C, G, T are 0 … 3, so that the complement of b is 3 - b; everything else is HIDDEN.
"""

from collections.abc import Iterable

import numpy as np

from caduceus.alphabet import CADUCEUS

HIDDEN = 4


def codes_of_tokens(tokens: np.ndarray) -> np.ndarray:
    """Codes of token ids, same shape, int64. [MASK], [PAD] and [UNK] are HIDDEN."""
    codes = tokens.astype(np.int64) - CADUCEUS.bases[0]
    return np.where((codes >= 0) & (codes < 4), codes, HIDDEN)


def count_contexts(sequences: Iterable[np.ndarray], k: int) -> np.ndarray:
    """Count, on both strands, every base with its k neighbours on either side.

    `sequences` are (L,) codes of forward strands. Returns (4,) * (2k + 1) int64 whose axes are the bases in reading
    order, the predicted one in the middle. Only places where all 2k + 1 bases are ACGT count.
    """
    width = 2 * k + 1
    flat = np.zeros(4**width, np.int64)
    for sequence in sequences:
        places = max(len(sequence) - width + 1, 0)
        index = np.zeros(places, np.int64)
        known = np.ones(places, bool)
        for offset in range(width):
            base = sequence[offset : offset + places]
            index = index * 4 + base
            known &= base != HIDDEN
        flat += np.bincount(index[known], minlength=len(flat))
    forward = flat.reshape((4,) * width)
    # Reading the other strand reverses the axes, and complementing (b -> 3 - b) reverses every axis.
    return forward + np.flip(forward.transpose())


def smoothed_probabilities(counts: np.ndarray, alpha: float) -> np.ndarray:
    """Probability of a base in every context, fully or partly visible: (5,) * 2k + (4,), k neighbours left, k right.

    Recursive additive smoothing: a context of width k is smoothed with `alpha` pseudo-counts, distributed as the
    context of width k - 1 predicts, down to base composition.
    """
    k = counts.ndim // 2
    table = np.moveaxis(counts, k, -1)
    for axis in range(2 * k):
        table = np.concatenate([table, table.sum(axis, keepdims=True)], axis)
    composition = table[(HIDDEN,) * 2 * k]
    probabilities = np.full(table.shape, composition / composition.sum())
    for reach in range(1, k + 1):
        # Contexts that see `reach` neighbours on either side, over axes (left, inner ones …, right, base).
        outside = (HIDDEN,) * (k - reach)
        seen = (*outside, *(slice(None),) * (2 * reach), *outside)
        inner = probabilities[seen][HIDDEN, ..., HIDDEN, :]
        counted = table[seen]
        prior = np.expand_dims(inner, (0, -2))
        smoothed = (counted + alpha * prior) / (counted.sum(-1, keepdims=True) + alpha)
        smoothed[HIDDEN, ..., HIDDEN, :] = inner
        probabilities[seen] = smoothed
    return probabilities


def contexts(codes: np.ndarray, reach: int, k: int) -> np.ndarray:
    """Neighbours of every position, k left and k right in reading order: (..., L) codes -> (..., L, 2k).

    Beyond the ends, and beyond `reach` places away, neighbours are HIDDEN.
    """
    length = codes.shape[-1]
    found = np.full((*codes.shape, 2 * k), HIDDEN)
    for column, offset in enumerate((*range(-k, 0), *range(1, k + 1))):
        if abs(offset) <= min(reach, length):
            here = slice(max(-offset, 0), min(length - offset, length))
            there = slice(max(offset, 0), min(length + offset, length))
            found[..., here, column] = codes[..., there]
    return found


def predict(probabilities: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Probabilities of A, C, G, T in each context: (..., 2k) codes -> (..., 4)."""
    return probabilities[tuple(np.moveaxis(context, -1, 0))]


def given_shown_base(predicted: np.ndarray, shown: np.ndarray, keep_prob: float, random_prob: float) -> np.ndarray:
    """Update predictions (n, 4) by the code (n,) that the input shows at the labelled position itself, by Bayes' rule.

    A labelled base is unchanged with `keep_prob`, replaced by a base drawn from A, C, G, T with `random_prob`, and
    hidden otherwise. A masked-base model learns this, so its baselines have to know it as well.
    """
    likelihood = random_prob / 4 + keep_prob * (shown[:, None] == np.arange(4))
    posterior = predicted * np.where(shown[:, None] == HIDDEN, 1.0, likelihood)
    return posterior / posterior.sum(-1, keepdims=True)


def loss(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Mean of -log p in nats: predicted (n, 4), truth (n,) codes."""
    return float(-np.log(np.take_along_axis(predicted, truth[:, None], 1)).mean())
