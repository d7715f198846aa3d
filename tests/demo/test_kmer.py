"""The vectorised k-mer models against a slow implementation with strings and dictionaries."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from caduceus.alphabet import CADUCEUS
from demo import kmer

COMPLEMENT = str.maketrans("ACGT", "TGCA")

sequences = st.lists(st.text("ACGTN", max_size=60), min_size=1, max_size=4)
alphas = st.floats(0.1, 50)
thorough = settings(max_examples=40, deadline=None)


def to_codes(text: str) -> np.ndarray:
    return np.array(["ACGT".find(base) % 5 for base in text], np.int64)


def slow_counts(sequences: list[str], k: int) -> Counter:
    """{window of 2k + 1 bases: occurrences} over both strands."""
    counts = Counter()
    for forward in sequences:
        for strand in (forward, forward.translate(COMPLEMENT)[::-1]):
            for start in range(len(strand) - 2 * k):
                window = strand[start : start + 2 * k + 1]
                if set(window) <= set("ACGT"):
                    counts[window] += 1
    return counts


def slow_probability(counts: Counter, left: str, base: str, right: str, alpha: float) -> float:
    """Probability of `base` between `left` and `right`, where '.' hides a neighbour."""
    k = len(left)
    reach = max(len(left.lstrip(".")), len(right.rstrip(".")))
    total = hits = 0
    for window, count in counts.items():
        there = window[:k] + window[k + 1 :]
        if all(asked in (".", found) for asked, found in zip(left + right, there, strict=True)):
            total += count
            hits += count * (window[k] == base)
    if reach == 0:
        return hits / total
    hide = "." * (k - reach + 1)
    narrower = slow_probability(counts, hide + left[len(hide) :], base, right[: reach - 1] + hide, alpha)
    return (hits + alpha * narrower) / (total + alpha)


def fit(texts: list[str], k: int, alpha: float) -> np.ndarray:
    counts = kmer.count_contexts([to_codes(text) for text in texts], k)
    assume(counts.sum() > 0)
    return kmer.smoothed_probabilities(counts, alpha)


@thorough
@given(sequences, st.integers(0, 3))
def test_counts_are_those_of_both_strands(texts, k):
    counts = kmer.count_contexts([to_codes(text) for text in texts], k)
    expected = slow_counts(texts, k)
    assert counts.shape == (4,) * (2 * k + 1)
    assert counts.sum() == expected.total()
    for window, count in expected.items():
        assert counts[tuple(to_codes(window))] == count


@thorough
@given(sequences, st.integers(0, 2), alphas, st.data())
def test_every_context_has_the_probability_of_the_definition(texts, k, alpha, data):
    probabilities = fit(texts, k, alpha)
    expected = slow_counts(texts, k)
    context = data.draw(st.text("ACGT.", min_size=2 * k, max_size=2 * k))
    for base in "ACGT":
        slow = slow_probability(expected, context[:k], base, context[k:], alpha)
        # Sums of fewer than 2k + 2 terms below 1 in float64.
        assert probabilities[(*to_codes(context), "ACGT".index(base))] == pytest.approx(slow, rel=1e-13, abs=1e-300)


@thorough
@given(sequences, st.integers(0, 3), alphas)
def test_probabilities_sum_to_one_and_agree_between_strands(texts, k, alpha):
    probabilities = fit(texts, k, alpha)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-13)
    complement = [3, 2, 1, 0, kmer.HIDDEN]
    other = probabilities[..., ::-1].transpose(*reversed(range(2 * k)), 2 * k)
    for axis in range(2 * k):
        other = np.take(other, complement, axis)
    np.testing.assert_allclose(other, probabilities, rtol=1e-13)


def test_soft_masking_is_ignored_and_other_codes_are_hidden():
    bases = np.frombuffer(b"ACGTacgtNnRy-", np.uint8)
    codes = kmer.codes_of_tokens(CADUCEUS.encode(bases))
    assert codes.tolist() == [0, 1, 2, 3] * 2 + [kmer.HIDDEN] * 5
    assert kmer.codes_of_tokens(np.array([CADUCEUS.mask, CADUCEUS.tokens.index("N")])).tolist() == [kmer.HIDDEN] * 2


@thorough
@given(st.text("ACGT.", max_size=30), st.integers(0, 3), st.integers(0, 3))
def test_contexts_are_the_neighbours_within_reach(text, k, reach):
    found = kmer.contexts(to_codes(text), reach, k)
    assert found.shape == (len(text), 2 * k)
    for place, context in enumerate(found):
        around = ("." * k + text + "." * k)[place : place + 2 * k + 1]
        expected = [symbol if abs(i - k) <= reach else "." for i, symbol in enumerate(around) if i != k]
        assert context.tolist() == to_codes("".join(expected)).tolist()


def test_contexts_of_a_batch_do_not_cross_from_one_sequence_to_the_next():
    batch = np.stack([to_codes("ACGT"), to_codes("TTTT")])
    found = kmer.contexts(batch, 2, 2)
    assert found[0, 3].tolist() == to_codes("CG..").tolist()
    assert found[1, 0].tolist() == to_codes("..TT").tolist()


def test_predict_looks_every_context_up():
    rng = np.random.default_rng(0)
    probabilities = rng.random((5, 5, 5, 5, 4))
    context = rng.integers(0, 5, (3, 7, 4))
    predicted = kmer.predict(probabilities, context)
    for i, j in product(range(3), range(7)):
        assert (predicted[i, j] == probabilities[tuple(context[i, j])]).all()


@pytest.mark.moderate
def test_the_shown_base_updates_by_the_masking_rule():
    """Against frequencies of a simulated masking: 10 % kept, 20 % random, 70 % hidden."""
    rng = np.random.default_rng(0)
    prior = np.array([0.4, 0.3, 0.2, 0.1])
    n = 2_000_000
    truth = rng.choice(4, n, p=prior)
    coin = rng.random(n)
    shown = np.where(coin < 0.1, truth, np.where(coin < 0.3, rng.integers(0, 4, n), kmer.HIDDEN))
    every = np.arange(5)
    posterior = kmer.given_shown_base(np.tile(prior, (5, 1)), every, keep_prob=0.1, random_prob=0.2)
    for code in every:
        frequency = np.bincount(truth[shown == code], minlength=4) / (shown == code).sum()
        # At least 90,000 draws per code: a standard error below 0.0017; five of them.
        np.testing.assert_allclose(posterior[code], frequency, atol=0.0085)
    np.testing.assert_allclose(posterior[kmer.HIDDEN], prior, rtol=1e-15)


def test_loss_is_the_mean_negative_log_likelihood():
    predicted = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    assert kmer.loss(predicted, np.array([1, 3])) == pytest.approx(-(np.log(0.25) + np.log(0.4)) / 2, rel=1e-15)


def test_neighbours_tell_what_composition_cannot():
    """In ACGTACGT… every base follows from its neighbours; composition alone is ln 4."""
    codes = to_codes("ACGT" * 500)
    probabilities = kmer.smoothed_probabilities(kmer.count_contexts([codes], 2), alpha=1.0)
    losses = [kmer.loss(kmer.predict(probabilities, kmer.contexts(codes, reach, 2)), codes) for reach in range(3)]
    # ACGT repeated is its own reverse complement. The composition is exactly uniform but for two windows' edges.
    assert losses[0] == pytest.approx(np.log(4), abs=1e-5)
    assert losses[1] < 0.01
    assert losses[2] < losses[1]
