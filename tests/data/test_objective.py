"""Tokens and labels against a plain reading of the definition, and the statistics of the masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caduceus.alphabet import CADUCEUS, IGNORE_LABEL, PLANTCAD, VOCABULARIES, Vocabulary
from caduceus.data.objective import Masking, Tokens, mask_bases, shift_bases, weigh_repeats
from caduceus.data.order import key
from tests.data.shard_fixture import complement_string, random_bases

PUBLISHED = Masking.of(0.15, 0.8, 0.1)
NO_MASK = Masking.of(0, 0, 0)
TOKENS = Tokens.of(CADUCEUS)
vocabularies = st.sampled_from(list(VOCABULARIES.values()))
CODES = "ACGTacgtNnRYSWKMBDHVryswkmbdhv"


def as_rows(*rows: str) -> np.ndarray:
    return np.array([list(row.encode()) for row in rows], np.uint8)


def tokens_of(bases: str, vocabulary: Vocabulary = CADUCEUS) -> list[int]:
    """The definition, letter by letter."""
    if vocabulary is PLANTCAD:
        return [{"A": 3, "C": 4, "G": 5, "T": 6}.get(base.upper(), 2) for base in bases]
    return [{"A": 7, "C": 8, "G": 9, "T": 10, "N": 4}.get(base.upper(), 6) for base in bases]


@settings(deadline=None)
@given(st.text(CODES, min_size=1, max_size=3000), st.booleans(), vocabularies)
def test_tokens_are_those_of_the_strand(bases: str, mirrored: bool, vocabulary: Vocabulary) -> None:
    shown = complement_string(bases) if mirrored else bases
    tokens = Tokens.of(vocabulary)
    input_ids, labels, invalid = mask_bases(as_rows(bases), np.array([mirrored]), key(1), 0, NO_MASK, tokens)
    assert input_ids[0].tolist() == tokens_of(shown, vocabulary)
    assert (labels == IGNORE_LABEL).all() and not invalid.any()


@settings(deadline=None)
@given(st.text(CODES, min_size=1, max_size=3000), st.booleans(), st.integers(0, 2**63), st.floats(0, 1), vocabularies)
def test_labels_are_the_true_bases_and_never_n_or_iupac(
    bases: str, mirrored: bool, seed: int, share: float, vocabulary: Vocabulary
) -> None:
    truth = np.array(tokens_of(complement_string(bases) if mirrored else bases, vocabulary))
    masking, tokens = Masking.of(share, 0.5, 0.4), Tokens.of(vocabulary)
    input_ids, labels, _ = mask_bases(as_rows(bases), np.array([mirrored]), key(seed), 0, masking, tokens)
    labelled = labels[0] != IGNORE_LABEL
    assert (labels[0][labelled] == truth[labelled]).all()
    assert np.isin(truth[labelled], vocabulary.bases).all()
    assert (input_ids[0][~labelled] == truth[~labelled]).all()
    assert np.isin(input_ids[0][labelled], [vocabulary.mask, *vocabulary.bases]).all()


@settings(deadline=None)
@given(st.integers(1, 5000), st.sampled_from([1, 2, 7, 64, 4000]), st.data())
def test_a_slice_masked_alone_is_the_slice_of_the_masked(length: int, span: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(first + 1, length))
    rng = np.random.default_rng(length)
    rows = as_rows(random_bases(rng, length), random_bases(rng, length))
    mirrored, keys = np.array([False, True]), key(9, np.arange(2))
    stored_slice = np.stack([rows[0, first:end], rows[1, length - end : length - first]])
    masking = Masking.of(0.15, 0.8, 0.1, span)
    whole = mask_bases(rows, mirrored, keys, 0, masking, TOKENS)
    alone = mask_bases(stored_slice, mirrored, keys, first, masking, TOKENS)
    assert (alone[0] == whole[0][:, first:end]).all()
    assert (alone[1] == whole[1][:, first:end]).all()


@pytest.mark.moderate
def test_spans_are_labelled_together_and_begin_anywhere() -> None:
    span, rows = 25, 400
    bases, keys = as_rows(*("A" * 5_000 for _ in range(rows))), key(3, np.arange(rows))
    masking = Masking.of(0.15, 0.6, 0.2, span)
    input_ids, labels, _ = mask_bases(bases, np.zeros(rows, bool), keys, 0, masking, TOKENS)
    labelled = labels != IGNORE_LABEL
    phases = set()
    for row in range(rows):
        edges = np.flatnonzero(np.diff(labelled[row].astype(int))) + 1
        assert len({int(edge) % span for edge in edges}) <= 1, "all borders of a row are a span apart"
        phases |= {int(edge) % span for edge in edges}
        if len(edges) > 1:
            phase = int(edges[0]) % span
            for first in range(phase, 5_000 - span, span):
                here = slice(first, first + span)
                masked = input_ids[row, here] == TOKENS.mask
                assert labelled[row, here].all() or not labelled[row, here].any()
                assert masked.all() or not masked.any()
    assert phases == set(range(span))
    by_place = labelled.mean(0)
    deviation = np.sqrt(0.15 * 0.85 / rows)
    assert abs(by_place - 0.15).max() < 5 * deviation, "each base is as likely as any other, the first ones too"
    changed = labelled & (input_ids != TOKENS.mask) & (input_ids != 7)
    letters = np.bincount(input_ids[changed], minlength=11)[8:]
    assert (abs(letters / letters.sum() - 1 / 3) < 0.03).all(), "random bases differ within a span"
    assert (np.diff(np.flatnonzero(changed.reshape(-1))) < 3).any()


def test_rows_may_have_shares_of_their_own() -> None:
    bases, shares = as_rows(*("ACGT" * 10_000 for _ in range(3))), np.array([0.0, 0.15, 1.0])
    masking, keys = Masking.of(shares, 0.8, 0.1), key(1, np.arange(3))
    _, labels, _ = mask_bases(bases, np.zeros(3, bool), keys, 0, masking, TOKENS)
    assert (labels[0] == IGNORE_LABEL).all() and (labels[2] != IGNORE_LABEL).all()
    _, alone, _ = mask_bases(bases[1:2], np.zeros(1, bool), keys[1:2], 0, PUBLISHED, TOKENS)
    assert (labels[1] == alone[0]).all()


@pytest.mark.parametrize(("share", "as_mask", "as_random"), [(0.15, 0.8, 0.1), (0.4, 0.5, 0.5), (1.0, 0.0, 0.0)])
def test_shares_are_those_asked_for(share: float, as_mask: float, as_random: float) -> None:
    bases = as_rows(*("A" * 50_000 for _ in range(8)))
    masking = Masking.of(share, as_mask, as_random)
    input_ids, labels, _ = mask_bases(bases, np.zeros(8, bool), key(2, np.arange(8)), 0, masking, TOKENS)
    labelled = labels != IGNORE_LABEL
    shown = input_ids[labelled]

    def assert_share(count: int, of: int, expected: float) -> None:
        assert abs(count - of * expected) <= 5 * np.sqrt(of * expected * (1 - expected))

    assert_share(labelled.sum(), bases.size, share)
    assert_share((shown == CADUCEUS.mask).sum(), len(shown), as_mask)
    for token in CADUCEUS.bases:  # random bases are uniform over A, C, G, T; an A may also be one shown as it is
        kept = (1 - as_mask - as_random) if token == CADUCEUS.bases[0] else 0
        assert_share((shown == token).sum(), len(shown), as_random / 4 + kept)


def test_masks_of_neighbouring_positions_and_samples_are_independent() -> None:
    bases, masking = as_rows(*("A" * 20_000 for _ in range(20))), Masking.of(0.5, 0.8, 0.1)
    _, labels, _ = mask_bases(bases, np.zeros(20, bool), key(0, np.arange(20)), 0, masking, TOKENS)
    labelled = (labels != IGNORE_LABEL) - 0.5
    for shift in (1, 2, 64):
        assert abs((labelled[:, shift:] * labelled[:, :-shift]).mean()) < 5 * 0.25 / np.sqrt(bases.size)
    assert abs((labelled[1:] * labelled[:-1]).mean()) < 5 * 0.25 / np.sqrt(bases.size)


@pytest.mark.moderate
@settings(deadline=None)
@given(st.text(CODES, min_size=2, max_size=500), st.booleans(), st.data(), vocabularies)
def test_next_base_labels(bases: str, mirrored: bool, data: st.DataObject, vocabulary: Vocabulary) -> None:
    truth = tokens_of(complement_string(bases) if mirrored else bases, vocabulary)
    following = [token if token in vocabulary.bases else IGNORE_LABEL for token in truth[1:]] + [IGNORE_LABEL]
    first = data.draw(st.integers(0, len(bases) - 1))
    end = data.draw(st.integers(first + 1, len(bases)))
    given_end = min(end + 1, len(bases))
    stored = bases[len(bases) - given_end : len(bases) - first] if mirrored else bases[first:given_end]
    input_ids, labels, invalid = shift_bases(as_rows(stored), np.array([mirrored]), end - first, Tokens.of(vocabulary))
    assert input_ids[0].tolist() == truth[first:end]
    assert labels[0].tolist() == following[first:end]
    assert not invalid.any()


@pytest.mark.parametrize("mirrored", [False, True])
def test_repeat_weights_lie_on_the_predicted_lower_case_bases(mirrored: bool) -> None:
    bases = "AcgTNnaT"
    shown = complement_string(bases) if mirrored else bases
    weights = weigh_repeats(as_rows(bases), np.array([mirrored]), 8, 0, 0.25)
    assert weights[0].tolist() == [0.25 if base.islower() else 1 for base in shown]
    shifted = weigh_repeats(as_rows(bases), np.array([mirrored]), 8, 1, 0.25)
    assert shifted[0].tolist() == [0.25 if base.islower() else 1 for base in shown[1:]] + [1]


def test_bytes_that_are_no_bases_are_counted() -> None:
    rows = np.stack([np.frombuffer(b"ACGTACGT", np.uint8), np.frombuffer(b"AC\0TA*GT", np.uint8)])
    assert mask_bases(rows, np.zeros(2, bool), key(0, np.arange(2)), 0, PUBLISHED, TOKENS)[2].tolist() == [0, 2]
    assert shift_bases(rows, np.ones(2, bool), 8, TOKENS)[2].tolist() == [0, 2]
