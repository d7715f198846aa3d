"""Epochs that shift the tiling, against a plain enumeration of their crops."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caduceus.config import Config, config_from_dict
from caduceus.data.crops import CropTable
from caduceus.data.epochs import ShiftedEpochs
from caduceus.data.genome import ShardedGenome
from caduceus.data.loader import build_loader, build_validation
from caduceus.data.samples import TrainingOrder
from caduceus.data.split_sources import open_sources
from caduceus.errors import UserError
from tests.data.shard_fixture import Species, random_bases, tile, write_dataset
from tests.data.test_crops import pieces


def tables_of(contigs: dict[str, str], window: int, strands: str, tmp_path_factory: pytest.TempPathFactory) -> list:
    windows = [row for name, bases in contigs.items() for row in tile(name, len(bases), window)]
    path = write_dataset(
        tmp_path_factory.mktemp("epochs"), [Species("s", contigs, {"train": windows}, strands=strands)]
    )
    table = ShardedGenome(path).table("s", "train")
    return [table, table]


def places_of(crops: CropTable, window: int, begin: int) -> list[tuple[int, int]]:
    """(window, base) of all that a crop holds."""
    parts = crops.pieces(window, begin)
    assert parts.offset[0] == 0 and (parts.offset[1:] == np.cumsum(parts.length)[:-1]).all()
    assert (parts.length > 0).all() and parts.length.sum() <= crops.seq_len
    assert (parts.begin + parts.length <= crops.windows["length"][parts.window]).all()
    found = zip(parts.window.tolist(), parts.begin.tolist(), parts.length.tolist(), strict=True)
    return [(row, first + place) for row, first, length in found for place in range(length)]


def epoch_of(epochs: ShiftedEpochs, source: int, number: int) -> list[tuple[int, int]]:
    """(window, begin) of all samples of an epoch, in their order."""
    k, samples = 0, []
    while (passed := epochs.passed(np.array([k, k]))[source]) < number + 1:
        if passed >= number:
            samples.append(k)
        k += 1
    window, begin = epochs.locate(np.full(len(samples), source), np.array(samples))
    return list(zip(window.tolist(), begin.tolist(), strict=True))


@pytest.mark.moderate
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    seq_len=st.integers(16, 90),
    window=st.integers(40, 300),
    strands=st.sampled_from(["both", "forward", "random"]),
    shuffle_block=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_packed_epochs_have_every_base_once_wherever_they_are_cut(
    lengths: list, seq_len: int, window: int, strands: str, shuffle_block: int, seed: int, tmp_path_factory
) -> None:
    contigs = {f"c{n}": "ACGT" * (length // 4) + "A" * (length % 4) for n, length in enumerate(lengths)}
    crops = CropTable(tables_of(contigs, window, strands, tmp_path_factory), seq_len, 0, pack=True)
    epochs = ShiftedEpochs(crops, seed, shuffle_block)
    shards = {}
    for number in (0, 1, 2):
        seen: Counter = Counter()
        for row, begin in epoch_of(epochs, 1, number):
            places = places_of(crops, row, begin)
            seen.update(places)
            shards[row, begin] = {int(crops.windows["shard"][window_row]) for window_row, _ in places}
        assert len(seen) == sum(lengths) == epochs.bases_seen[1] and set(seen.values()) == {1}
    assert all(len(found) == 1 for found in shards.values())


@pytest.mark.moderate
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=pieces,
    seq_len=st.integers(16, 70),
    window=st.integers(70, 400),
    min_acgt=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    strands=st.sampled_from(["both", "random"]),
    offset=st.integers(1, 69),
)
def test_a_shifted_tiling_is_that_of_a_plain_enumeration(
    pieces: list, seq_len: int, window: int, min_acgt: float, strands: str, offset: int, tmp_path_factory
) -> None:
    bases = "".join((text * length)[:length] for text, length in pieces) + "ACGT" * 20
    tables = tables_of({"c": bases}, window, strands, tmp_path_factory)
    crops, offset = CropTable(tables, seq_len, min_acgt), offset % seq_len
    listed = [np.zeros(int(length), bool) for length in tables[0].windows["length"]]
    for run in tables[0].runs:
        listed[run["window"]][run["start"] : run["start"] + run["length"]] = True
    expected, seen = [], set()
    for row, of_window in enumerate(listed):
        begins = [*range(offset, len(of_window) - seq_len + 1, seq_len)]
        if len(begins) < len(of_window) // seq_len:  # the end with more bases left gets one more
            right = len(of_window) - (offset + len(begins) * seq_len)
            begins = [*begins, len(of_window) - seq_len] if right >= offset else [0, *begins]
        for begin in begins:
            acgt = seq_len - int(of_window[begin : begin + seq_len].sum())
            if acgt >= 1 and acgt >= min_acgt * seq_len - 1e-6:
                expected.append((row + len(listed), begin))
                seen |= {(row, place) for place in range(begin, begin + seq_len)}
    tiling = crops.shifted(1, offset)
    found = crops.locate_shifted(1, offset, np.arange(tiling.size))
    assert list(zip(*(values.tolist() for values in found), strict=True)) == expected
    assert tiling.bases(np.array([0, len(listed)])) == [len(seen)]
    assert tiling.left_out + tiling.size == sum(len(of_window) // seq_len for of_window in listed)
    shard_of_crop = tables[0].windows["shard"][found[0] - len(listed)]
    assert tiling.crops_of_shard.tolist() == np.bincount(shard_of_crop, minlength=len(tables[0].shards)).tolist()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two species whose windows are no multiples of a sequence, with validation."""
    rng = np.random.default_rng(8)
    contigs = {f"c{n}": random_bases(rng, length) for n, length in enumerate((700, 331, 64, 300))}
    windows = [row for name in ("c0", "c1", "c2") for row in tile(name, len(contigs[name]), 400)]
    splits = {"train": windows, "valid": tile("c3", 300, 400)}
    both = [Species(name, contigs, splits, strands="random") for name in ("s", "t")]
    return write_dataset(tmp_path_factory.mktemp("shifted"), both)


def config_of(shards: Path, **data: object) -> Config:
    values = {"path": str(shards), "seq_len": 64, "workers": 0, "crop_offset": "random", **data}
    return config_from_dict({"data": values, "train": {"global_batch": 4, "micro_batch": 4}})


@pytest.mark.moderate
@pytest.mark.parametrize("pack", [False, True])
def test_samples_are_a_function_of_seed_and_number_alone(shards: Path, pack: bool) -> None:
    config, other = config_of(shards, pack=pack), config_of(shards, pack=pack)
    split_sources, other.train.seed = open_sources(config.data, "train"), 6
    g = np.arange(3000)
    at_once = TrainingOrder(split_sources, config).locate(g)
    again = TrainingOrder(open_sources(config.data, "train"), config)
    backwards = np.concatenate([again.locate(g[first : first + 100]) for first in range(2900, -1, -100)][::-1])
    assert np.array_equal(at_once, backwards)
    assert not np.array_equal(at_once["begin"], TrainingOrder(split_sources, other).locate(g)["begin"])
    borders = {int(begin) % 64 for begin in at_once["begin"] if begin >= 0}
    assert len(borders) > 20, "each epoch begins elsewhere"
    seen = {place for one in at_once for place in places_of(split_sources.crops, int(one["window"]), int(one["begin"]))}
    assert len(seen) == int(split_sources.crops.windows["length"].sum(dtype=np.int64)), "the ends have their turn"


def test_validation_and_the_order_of_fixed_tilings_stay(shards: Path) -> None:
    fixed, shifted = config_of(shards, crop_offset="none"), config_of(shards)
    for (_, one), (_, other) in zip(build_validation(fixed), build_validation(shifted), strict=True):
        assert one.input_ids.equal(other.input_ids) and one.labels.equal(other.labels)
    assert build_loader(fixed).fingerprint != build_loader(shifted).fingerprint


def test_epochs_and_the_share_of_the_first_are_told(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(shards, pack=True)
    with caplog.at_level("INFO"):
        loader = build_loader(config)
    assert "that no crop holds: s 0.00%, t 0.00% in its first epoch; others are tiled differently" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        build_loader(config_of(shards))
    crops, epochs = open_sources(config_of(shards).data, "train").crops, loader.epochs()
    share = 1 - ShiftedEpochs(crops, 0, 0).bases_seen[0] / 1095
    assert 0 < share < 0.4 and f"s {share:.2%}" in caplog.text
    assert epochs == {"s": 0.0, "t": 0.0}
    loader.seek(4 * 100)
    assert all(5 < passed < 15 for passed in loader.epochs().values())
    with pytest.raises(UserError, match=r"data\.crop_offset: data\.mode=stream cuts windows as they come"):
        config_of(shards, mode="stream")
