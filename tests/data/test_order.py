"""The closed forms: bijections are bijections, mixtures are exact, epochs visit every crop once, at any position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caduceus.data.order import MIXTURE_BLOCK, EpochOrder, Mixture, key, largest_remainder, permute
from caduceus.errors import UserError

BILLION = 10**9


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_permute_is_a_bijection(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, key(seed))) == list(range(size))


@pytest.mark.parametrize("size", [2**40 + 7, 2**52, 3 * 10**12])
def test_permute_stays_inside_and_apart_on_huge_domains(size: int) -> None:
    position = np.unique(np.random.default_rng(0).integers(0, size, 50_000))
    image = permute(position, size, key(1))
    assert image.min() >= 0 and image.max() < size
    assert len(np.unique(image)) == len(position)


def test_permute_takes_sizes_and_keys_of_each_element() -> None:
    sizes = np.array([1, 2, 5, 1000, 12345])
    keys = key(np.arange(5))
    together = permute(sizes - 1, sizes, keys)
    alone = [permute(np.array([size - 1]), int(size), keys[i : i + 1])[0] for i, size in enumerate(sizes)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [3, 7, 16, 100])
def test_permute_is_uniform_over_keys(size: int) -> None:
    draws = 40_000
    image = permute(np.full(draws, size // 2), size, key(7, np.arange(draws)))
    counts = np.bincount(image, minlength=size)
    chi_square = ((counts - draws / size) ** 2 / (draws / size)).sum()
    assert chi_square < size - 1 + 6 * np.sqrt(2 * size)  # six standard deviations of the chi-square


def test_neighbours_land_independently() -> None:
    image = permute(np.arange(100_000), 100_000, key(3)).astype(float)
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 6 / np.sqrt(100_000)
    assert abs(np.corrcoef(image, np.arange(100_000))[0, 1]) < 6 / np.sqrt(100_000)


@given(weights=st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=50), total=st.integers(50, 70_000))
def test_largest_remainder_rounds_to_the_total(weights: list[float], total: int) -> None:
    counts = largest_remainder(weights, total)
    exact = np.array(weights) / np.sum(weights) * total
    assert counts.sum() == total and counts.min() >= 1
    raised = exact < 1  # these were given 1 at the expense of the others
    assert np.all(np.abs(counts - exact)[~raised] <= 1 + raised.sum())


def test_more_sources_than_a_block_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.path"):
        largest_remainder([1.0] * 3, 2)


@pytest.mark.parametrize("block", [0, 1, BILLION // MIXTURE_BLOCK, 10**12])
def test_mixture_is_exact_in_every_block(block: int) -> None:
    mixture = Mixture([3.0, 1.0, 0.001, 2.5], seed=5)
    source, k = mixture.locate(block * MIXTURE_BLOCK + np.arange(MIXTURE_BLOCK))
    assert np.bincount(source, minlength=4).tolist() == mixture.counts.tolist()
    for number, count in enumerate(mixture.counts):  # a source's own numbers go up by 1, over blocks too
        assert k[source == number].tolist() == list(range(block * count, (block + 1) * count))


@pytest.mark.parametrize("start", [0, 61_000, BILLION - 5_000])
def test_mixture_is_close_in_every_ten_thousand_samples(start: int) -> None:
    mixture = Mixture([0.6, 0.3, 0.1], seed=11)
    source, _ = mixture.locate(start + np.arange(40_000))
    share = mixture.counts / MIXTURE_BLOCK
    for number in range(3):
        seen = np.convolve(source == number, np.ones(10_000), "valid")
        deviation = np.sqrt(10_000 * share[number] * (1 - share[number]))  # of independent draws; these are closer
        assert np.abs(seen - 10_000 * share[number]).max() < 6 * deviation


@pytest.mark.moderate
@settings(deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), min_size=1, max_size=4),
    shuffle_block=st.integers(0, 5),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 10**6),
)
def test_an_epoch_visits_every_crop_once(shards: list[list[int]], shuffle_block: int, seed: int, epoch: int) -> None:
    for counts in shards:
        counts[0] += 1  # no source is empty
    crops_of_shard = np.concatenate(shards)
    order = EpochOrder(crops_of_shard, [len(counts) for counts in shards], seed, shuffle_block)
    first = 0
    for source, counts in enumerate(shards):
        size = sum(counts)
        assert order.sizes[source] == size
        crops = order.locate(np.full(size, source), epoch * size + np.arange(size))
        assert sorted(crops) == list(range(first, first + size))
        if shuffle_block:
            shard = np.searchsorted(np.cumsum(counts), crops - first, side="right")
            _assert_few_shards_at_once(shard, counts, shuffle_block)
        first += size


def _assert_few_shards_at_once(shard: np.ndarray, counts: list[int], shuffle_block: int) -> None:
    """Shards in play (begun and not finished) never exceed the block."""
    seen = np.zeros(len(counts), int)
    for one in shard:
        seen[one] += 1
        assert ((seen > 0) & (seen < counts)).sum() <= shuffle_block


def test_orders_differ_by_seed_and_by_epoch() -> None:
    def crops(seed: int, epoch: int) -> list[int]:
        return EpochOrder(np.array([500]), [1], seed).locate(np.zeros(500, int), epoch * 500 + np.arange(500)).tolist()

    assert len({tuple(crops(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.moderate
def test_any_number_is_located_alone_as_among_others() -> None:
    mixture = Mixture([2.0, 1.0], seed=1)
    order = EpochOrder(np.array([40, 50, 60, 7]), [3, 1], seed=1, shuffle_block=2)
    g = np.random.default_rng(0).integers(0, 10 * BILLION, 20)
    together = order.locate(*mixture.locate(g))
    assert together.tolist() == [order.locate(*mixture.locate(g[i : i + 1]))[0] for i in range(20)]
