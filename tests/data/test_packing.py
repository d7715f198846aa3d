"""Packed sequences: every base once an epoch, and each sequence as if it stood alone."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caduceus import CaduceusForMaskedLM
from caduceus.config import CaduceusConfig, Config, config_from_dict
from caduceus.data.crops import CropTable
from caduceus.data.genome import ShardedGenome
from caduceus.data.loader import build_loader, build_validation
from caduceus.data.order import EpochOrder
from caduceus.data.split_sources import open_sources
from caduceus.distributed.layout import check_layout
from caduceus.errors import UserError
from caduceus.train.trainer import train
from tests.data.shard_fixture import Species, random_bases, tile, write_dataset
from tests.distributed.layouts import Layout, train_all
from tests.distributed.layouts import config_of as config_of_layout
from tests.train.conftest import SmallRun, numbers


def config_of(path: Path, seq_len: int = 64, **sections: dict) -> Config:
    values = {"data": {"path": str(path), "seq_len": seq_len, "workers": 0, "pack": True, "min_acgt": 0}}
    values["train"] = {"global_batch": 4, "micro_batch": 4}
    values["model"] = {"d_model": 8, "n_layer": 2, "d_state": 4, "rcps": True}
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return config_from_dict(values)


@pytest.mark.moderate
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    seq_len=st.integers(16, 90),
    window=st.integers(40, 300),
    strands=st.sampled_from(["both", "forward", "random"]),
    shuffle_block=st.sampled_from([0, 1]),
)
def test_an_epoch_has_every_base_once(
    lengths: list, seq_len: int, window: int, strands: str, shuffle_block: int, tmp_path_factory
) -> None:
    contigs = {f"c{n}": "ACGT" * (length // 4) + "A" * (length % 4) for n, length in enumerate(lengths)}
    windows = [row for name, bases in contigs.items() for row in tile(name, len(bases), window)]
    one = Species("s", contigs, {"train": windows}, strands=strands)
    table = ShardedGenome(write_dataset(tmp_path_factory.mktemp("packing"), [one])).table("s", "train")
    crops = CropTable([table], seq_len, 0, pack=True)
    order = EpochOrder(crops.crops_of_shard, crops.shards_of_source, seed=3, shuffle_block=shuffle_block)
    epoch = order.locate(np.zeros(crops.size, np.int64), crops.size * 2 + np.arange(crops.size))
    seen: Counter = Counter()
    for row, begin in zip(*crops.locate(epoch), strict=True):
        pieces = crops.pieces(int(row), int(begin))
        assert len({int(shard) for shard in crops.windows["shard"][pieces.window]}) == 1
        assert pieces.offset[0] == 0 and (pieces.length > 0).all()
        assert (pieces.offset[1:] == np.cumsum(pieces.length)[:-1]).all() and pieces.length.sum() <= seq_len
        for window_row, first, length in zip(pieces.window, pieces.begin, pieces.length, strict=True):
            of_window = crops.windows[window_row]
            start = int(of_window["start"]) + int(first)
            assert first + length <= of_window["length"]
            seen.update((int(of_window["contig"]), place) for place in range(start, start + int(length)))
    assert len(seen) == sum(lengths) == int(crops.bases_of_source[0]) and set(seen.values()) == {1}
    assert crops.left_out_bases == 0 and crops.size - -(-sum(lengths) // seq_len) < 2 * len(crops.shards)


def contigs() -> dict[str, str]:
    rng = np.random.default_rng(5)
    return {f"c{n}": random_bases(rng, length) for n, length in enumerate((20, 150, 33, 64, 7, 90, 41, 55))}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contigs that are shorter than a sequence, or not a multiple of it, for training and for validation."""
    windows = {name: tile(name, len(bases), 1000) for name, bases in contigs().items()}
    splits = {"train": [row for name in windows if name != "c5" for row in windows[name]], "valid": windows["c5"]}
    return write_dataset(tmp_path_factory.mktemp("short"), [Species("s", contigs(), splits, strands="random")])


@pytest.mark.moderate
@pytest.mark.parametrize("strands", ["forward", "both"])
@pytest.mark.parametrize("objective", ["mlm", "next_base"])
def test_a_packed_row_predicts_what_each_of_its_sequences_predicts_alone(
    short: Path, strands: str, objective: str
) -> None:
    one_way = {"rcps": False, "bidirectional": False} if objective == "next_base" else {}
    config = config_of(short, data={"strands": strands, "objective": objective}, model=one_way)
    config.model.rcps = config.model.rcps and strands == "forward"
    loader, crops = build_loader(config), open_sources(config.data, "train").crops
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(CaduceusConfig(**vars(config.model)), "cpu").eval()
    rows = iter(loader)
    packed = 0
    for _ in range(2 * crops.size):
        batch = next(rows)
        if batch.starts is None:
            continue
        with torch.no_grad():
            together = model(batch.input_ids, starts=batch.starts).logits
            for ids, starts, labels, logits in zip(batch.input_ids, batch.starts, batch.labels, together, strict=True):
                borders = [*starts.nonzero().flatten().tolist(), len(ids)] if starts.any() else [0, len(ids)]
                packed += len(borders) > 2
                assert borders[0] == 0
                for first, end in itertools.pairwise(borders):
                    alone = model(ids[None, first:end]).logits[0]
                    torch.testing.assert_close(logits[first:end], alone, rtol=1e-4, atol=1e-5)
                    assert objective == "mlm" or labels[end - 1] < 0
    assert packed > 2


def test_bases_of_a_row_are_those_of_the_genome(short: Path) -> None:
    config = config_of(short, data={"mask_prob": 1e-9, "strands": "both"}, model={"rcps": False})
    loader, crops = build_loader(config), open_sources(config.data, "train").crops
    letters = dict(zip(config.model.vocabulary.bases, "ACGT", strict=True))
    rows, strands = iter(loader), set()
    for _ in range(4):
        batch = next(rows)
        for g, ids in zip(batch.g.tolist(), batch.input_ids, strict=True):
            text = "".join(letters.get(int(token), "N") for token in ids)
            where = loader.describe(g)
            strands.add(where["strand"])
            if where["strand"] == "-":
                text = text[::-1].translate(str.maketrans("ACGT", "TGCA"))
            bases = contigs()[where["contig"]][where["start"] : where["end"]].upper()
            assert 0 < len(bases) <= 64 and text.startswith(bases)
    assert strands == {"+", "-"} and len(crops.tables[0].windows) == 7


@pytest.mark.moderate
def test_windows_shorter_than_a_sequence_train_and_validate(short: Path, tmp_path: Path) -> None:
    config = SmallRun(short, tmp_path).config(
        "run",
        data={"seq_len": 128, "pack": True, "min_acgt": 0},
        train={"steps": 4, "precision": "fp32"},
        valid={"every": 2},
    )
    assert train(config) == 0
    rows = numbers(config.run.dir)
    assert [row["step"] for row in rows if "valid_loss" in row] == [2, 4]
    assert all(row["valid_rc_disagreement"] < 1e-5 for row in rows if "valid_loss" in row)
    assert sum(build_validation(config).samples.values()) == 1


def test_where_packed_sequences_cannot_go_a_line_says_so(short: Path) -> None:
    with pytest.raises(UserError, match=r"data\.pack: the ranks of parallel\.context cannot share packed sequences"):
        config_of(short, parallel={"context": 2})
    with pytest.raises(UserError, match=r"data.pack: data.mode=stream takes"):
        config_of(short, data={"mode": "stream"})
    automatic = config_of(short, train={"global_batch": 1, "micro_batch": 1})
    assert check_layout(automatic, 2).strands == 2
    with pytest.raises(UserError, match=r"no parallel\.context fits"):
        check_layout(automatic, 4)


@pytest.mark.slow
def test_ranks_that_share_strands_or_batches_have_the_losses_of_one_process(short: Path, tmp_path: Path) -> None:
    losses = {}
    for layout in (Layout("one", 1, {"strategy": "single"}), Layout("ddp", 2, {"strategy": "ddp"})):
        layouts = [layout, replace(layout, name="strands", parallel={"strategy": "ddp", "strands": 2})][: layout.world]
        configs = [config_of_layout(one, short, tmp_path / one.name, steps=3, precision="fp64") for one in layouts]
        for config in configs:
            config.data.pack, config.data.min_acgt = True, 0.0
        train_all(layout.world, configs)
        for config in configs:
            losses[config.run.name] = [row["loss"] for row in numbers(config.run.dir)]
    assert losses["ddp"] == pytest.approx(losses["one"], rel=1e-9)
    assert losses["strands"] == pytest.approx(losses["one"], rel=1e-9)
