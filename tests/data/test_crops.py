"""The crop table against a plain enumeration of the windows."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caduceus.data.crops import CropTable
from caduceus.data.format import MIN_RUN
from caduceus.data.genome import ShardedGenome
from caduceus.data.tiling import Cut, Tiling
from caduceus.errors import UserError
from tests.data.shard_fixture import Species, tile, write_dataset

pieces = st.lists(
    st.tuples(st.sampled_from(["ACGT", "N", "acgtn", "R", "n"]), st.integers(1, 120)), min_size=1, max_size=12
)


def expected_crops(bases: str, windows: list, seq_len: int, min_acgt: float) -> list[tuple[int, int]]:
    """(window row, begin) of each usable crop; non-ACGT counts where it is part of a run of MIN_RUN or more."""
    crops = []
    for row, (_, start, end) in enumerate(windows):
        window = bases[start:end]
        listed = np.zeros(len(window), bool)
        first = 0
        while first < len(window):
            last = first
            while last < len(window) and window[last] not in "ACGTacgt":
                last += 1
            if last - first >= MIN_RUN:
                listed[first:last] = True
            first = max(last, first + 1)
        for begin in range(0, len(window) - seq_len + 1, seq_len):
            acgt = seq_len - int(listed[begin : begin + seq_len].sum())
            if acgt >= 1 and acgt >= min_acgt * seq_len - 1e-6:
                crops.append((row, begin))
    return crops


@pytest.mark.moderate
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=pieces,
    seq_len=st.integers(16, 70),
    window=st.integers(70, 400),
    min_acgt=st.sampled_from([0.0, 0.1, 0.5, 0.55, 1.0]),
    strands=st.sampled_from(["both", "forward", "random"]),
)
def test_crops_are_all_the_usable_tiles_and_no_other(
    pieces: list, seq_len: int, window: int, min_acgt: float, strands: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bases = "".join((text * length)[:length] for text, length in pieces) + "ACGT" * 20
    windows = tile("c", len(bases), window)
    one = Species("s", {"c": bases}, {"train": windows}, strands=strands)
    table = ShardedGenome(write_dataset(tmp_path_factory.mktemp("crops"), [one])).table("s", "train")
    crops = CropTable([table, table], seq_len, min_acgt)  # the same source twice: numbers go on over sources
    expected = expected_crops(bases, windows, seq_len, min_acgt)
    both = expected + [(row + len(windows), begin) for row, begin in expected]
    rows, begins = crops.locate(np.arange(crops.size))
    assert list(zip(rows.tolist(), begins.tolist(), strict=True)) == both
    assert crops.left_out_bases == 2 * sum((end - start) % seq_len for _, start, end in windows)
    assert crops.left_out_tiles + crops.size == 2 * sum((end - start) // seq_len for _, start, end in windows)
    shard_of_crop = crops.windows["shard"][rows]
    assert crops.crops_of_shard.tolist() == np.bincount(shard_of_crop, minlength=len(crops.shards)).tolist()


def test_a_window_of_n_is_never_a_crop_even_with_min_acgt_0(tmp_path: Path) -> None:
    bases = "ACGT" * 64 + "N" * 512 + "ACGT" * 64
    one = Species("s", {"c": bases}, {"train": tile("c", len(bases), 256)})
    table = ShardedGenome(write_dataset(tmp_path, [one])).table("s", "train")
    for seq_len in (16, 64, 256):
        rows, begins = CropTable([table], seq_len, 0).locate(np.arange(512 // seq_len))
        for row, begin in zip(rows, begins, strict=True):
            start = int(table.windows["start"][row]) + int(begin)
            assert set(bases[start : start + seq_len]) == set("ACGT")


def test_crops_shorter_than_the_index_can_judge_are_refused(tmp_path: Path) -> None:
    table = ShardedGenome(write_dataset(tmp_path, [Species("s", {"c": "A" * 99}, {"train": [("c", 0, 99)]})]))
    with pytest.raises(UserError, match=r"data\.seq_len: must be at least 16"):
        CropTable([table.table("s", "train")], 15, 0.5)


@pytest.mark.parametrize("offset", [0, 1])
def test_crops_are_numbered_beyond_32_bits(offset: int) -> None:
    """Five windows of 2^31 - 2 bases in three shards, in crops of two."""
    length, none = 2**31 - 2, np.zeros(0, [("window", "<u4"), ("start", "<u4"), ("length", "<u4")])
    windows = np.full(5, length, np.uint32)
    tiling = Tiling(windows, np.array([0, 2, 3, 5]), [(0, none)], Cut(2, 0.0), offset)
    per_window = length // 2
    assert tiling.size == 5 * per_window > 2**32
    assert tiling.crops_of_shard.tolist() == [2 * per_window, per_window, 2 * per_window]
    window, begin, _ = tiling.locate(np.array([0, 2**32 - 1, 2**32, 5 * per_window - 1]))
    assert window.tolist() == [0, 4, 4, 4]
    starts = [2 * (number - at * per_window) for number, at in zip((0, 2**32 - 1, 2**32), (0, 4, 4), strict=True)]
    assert begin.tolist() == [*(start + offset for start in starts), length - 2]
