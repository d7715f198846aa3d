"""Batches: the same samples whatever ranks, workers and restarts; true to the genome; refusals in one line."""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.alphabet import CADUCEUS, IGNORE_LABEL
from caduceus.config import Config
from caduceus.config.by_step import BatchRamp
from caduceus.data import Batch, build_loader, build_validation
from caduceus.data.batch import FILLER, RankSchedule
from caduceus.errors import UserError
from tests.data.batches import assert_same, take
from tests.data.shard_fixture import Species, complement_string, random_bases, tile, write_dataset


def rows_by_number(batches: list[Batch]) -> dict[int, tuple[bytes, bytes]]:
    rows = {}
    for batch in batches:
        for g, ids, labels in zip(batch.g.tolist(), batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
            assert g not in rows
            rows[g] = (ids.tobytes(), labels.tobytes())
    return rows


@pytest.mark.parametrize("strands", ["both", "forward"])
def test_samples_are_the_genome_on_the_strand_they_name(
    configure: Callable[..., Config], species: list[Species], strands: str
) -> None:
    genomes = {one.name: one.contigs for one in species}
    loader = build_loader(configure(strands=strands))
    seen = Counter()
    for batch in take(loader, 60):
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        for g, ids, labels in zip(batch.g.tolist(), batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
            where = loader.describe(g)
            bases = genomes[where["species"]][where["contig"]][where["start"] : where["end"]]
            shown = complement_string(bases) if where["strand"] == "-" else bases
            truth = CADUCEUS.encode(np.frombuffer(shown.encode(), np.uint8))
            labelled = labels != IGNORE_LABEL
            assert (ids[~labelled] == truth[~labelled]).all() and (labels[labelled] == truth[labelled]).all()
            assert 0 < labelled.sum() < 256 / 2
            assert len(re.sub("[^ACGTacgt]{16,}", "", bases)) >= 128
            seen[where["species"], where["strand"]] += 1
    assert set(seen) == {(name, strand) for name in ("fly", "worm") for strand in ("+-" if strands == "both" else "+")}


def test_auto_strands_follow_the_model(configure: Callable[..., Config]) -> None:
    def seen(**model: bool) -> set[str]:
        loader = build_loader(configure(model=model))
        return {loader.describe(g)["strand"] for g in range(100)}

    assert seen(rcps=True) == {"+"}
    assert seen(rcps=False) == {"+", "-"}


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_the_same_global_batches(configure: Callable[..., Config], world: int) -> None:
    config = configure()
    alone = rows_by_number(take(build_loader(config), 18))  # three steps of 24
    together = [build_loader(config, rank=rank, world=world) for rank in range(world)]
    batches = []
    for rank, loader in enumerate(together):
        mine = take(loader, 3 * loader.per_step)
        assert torch.cat([batch.g for batch in mine]).tolist() == list(range(rank, 72, world))
        batches += mine
    assert rows_by_number(batches) == alone


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
def test_schedules_cover_every_sample_once(world: int) -> None:
    schedules = [RankSchedule(BatchRamp((0,), (576,)), 3, rank, world) for rank in range(world)]
    far = 10**9 // 576
    for step in (0, far):
        numbers = [s.samples(step * s.per_step(0) + np.arange(2 * s.per_step(0))) for s in schedules]
        assert sorted(np.concatenate([n.reshape(-1) for n in numbers])) == list(range(step * 576, (step + 2) * 576))


def test_micro_batches_are_the_global_batch_in_order(configure: Callable[..., Config]) -> None:
    small = rows_by_number(take(build_loader(configure(), micro_batch=2), 12))
    assert list(small) == list(range(24))
    assert rows_by_number(take(build_loader(configure(), micro_batch=24), 1)) == small


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mlm", "next_base"])
def test_workers_do_not_change_batches(configure: Callable[..., Config], objective: str) -> None:
    settings = {"objective": objective, "repeat_weight": 0.1, "model": {"bidirectional": objective == "mlm"}}
    alone = take(build_loader(configure(**settings)), 50)
    for workers in (1, 4):
        assert_same(take(build_loader(configure(workers=workers, **settings)), 50), alone)


@pytest.mark.moderate
def test_a_restart_anywhere_goes_on_identically(configure: Callable[..., Config]) -> None:
    config = configure()
    whole = take(build_loader(config), 60)
    for step in (1, 3, 7):
        loader = build_loader(config)
        assert_same(take(loader, 6 * step + 2), whole[: 6 * step + 2])
        state = loader.state()
        assert state == {"fingerprint": loader.fingerprint, "seed": 0, "samples_consumed": 24 * step}
        resumed = build_loader(config)
        resumed.load_state(state)
        assert_same(take(resumed, 60 - 6 * step), whole[6 * step :])
        sought = build_loader(config)
        sought.seek(24 * step)
        assert_same(take(sought, 60 - 6 * step), whole[6 * step :])


def test_a_restart_may_change_ranks_and_micro_batch(configure: Callable[..., Config]) -> None:
    config = configure()
    whole = rows_by_number(take(build_loader(config), 30))
    first = take(build_loader(config), 12)
    rest = []
    for rank in range(3):
        loader = build_loader(config, rank=rank, world=3, micro_batch=8)
        loader.seek(48)
        rest += take(loader, 3)
    assert rows_by_number(first + rest) == whole


def test_the_position_is_reached_at_once_at_a_billion_samples(configure: Callable[..., Config]) -> None:
    start = 24 * (10**9 // 24)
    loader = build_loader(configure())
    loader.seek(start)
    batch = next(iter(loader))
    assert batch.g.tolist() == list(range(start, start + 4))
    assert loader.describe(start)["species"] in ("fly", "worm")


@pytest.mark.moderate
def test_an_epoch_of_each_species_visits_every_crop_once(
    configure: Callable[..., Config], species: list[Species]
) -> None:
    loader = build_loader(configure(strands="forward", min_acgt=0.0))
    seen: dict[str, list] = {"fly": [], "worm": []}
    for g in range(600):
        where = loader.describe(g)
        seen[where["species"]].append((where["contig"], where["start"]))
    for one in species[:2]:
        crops = [
            (contig, begin)
            for contig, start, end in one.windows["train"]
            for begin in range(start, end - 255, 256)
            if set(one.contigs[contig][begin : begin + 256]) != {"N"}
        ]
        for epoch in range(2):
            assert sorted(seen[one.name][epoch * len(crops) : (epoch + 1) * len(crops)]) == sorted(crops)


@pytest.mark.moderate
def test_slices_of_a_sequence_are_the_sequence(configure: Callable[..., Config]) -> None:
    for settings in ({}, {"objective": "next_base", "model": {"bidirectional": False}}):
        config = configure(repeat_weight=0.5, **settings)
        whole = take(build_loader(config), 6)
        edges = [0, 64, 65, 200, 256]
        parts = [take(build_loader(config, positions=edge), 6) for edge in itertools.pairwise(edges)]
        joined = [
            Batch(
                torch.cat([part.input_ids for part in same], dim=1),
                torch.cat([part.labels for part in same], dim=1),
                torch.cat([part.loss_weights for part in same], dim=1),
                same[0].g,
            )
            for same in zip(*parts, strict=True)
        ]
        assert_same(joined, whole)


@pytest.mark.moderate
def test_weights_and_directories_mix_as_asked(tmp_path: Path, configure: Callable[..., Config]) -> None:
    bases = random_bases(np.random.default_rng(0), 1024)

    def dataset(name: str, **weights: float | None) -> str:
        parts = [Species(one, {"c": bases}, {"train": tile("c", 1024, 512)}, weight) for one, weight in weights.items()]
        return str(write_dataset(tmp_path / name, parts))

    path = [
        {"path": dataset("one", a=1.0, b=3.0), "weight": 2.0},
        {"path": dataset("two", c=8.0)},
    ]
    loader = build_loader(configure(path=path))
    counts = Counter(loader.describe(g)["species"] for g in range(1000))
    for name, share in (("a", 2 / 16), ("b", 6 / 16), ("c", 8 / 16)):
        assert abs(counts[name] - 1000 * share) < 5 * np.sqrt(1000 * share * (1 - share))
    with pytest.raises(UserError, match=r"data\.path: species 'a' stands in more than one"):
        build_loader(configure(path=[path[0], {"path": dataset("three", a=None)}]))
    for weight in (0, -1, "x", float("inf")):
        with pytest.raises(UserError, match="must be a positive number"):
            build_loader(configure(path=[{**path[0], "weight": weight}]))


@pytest.mark.moderate
def test_a_state_of_another_order_is_refused(configure: Callable[..., Config], tmp_path: Path) -> None:
    state = build_loader(configure()).state()
    build_loader(configure(workers=1, repeat_weight=0.5, train={"micro_batch": 8})).load_state(state)
    one = Species("fly", {"c": "ACGT" * 500}, {"train": tile("c", 2000, 500)})
    for changed in (
        {"seq_len": 128},
        {"strands": "forward"},
        {"mask_prob": 0.2},
        {"random_token_prob": 0.2},
        {"min_acgt": 0.6},
        {"shuffle_block": 1},
        {"train": {"global_batch": 12}},
        {"train": {"seed": 1}},
        {"path": str(write_dataset(tmp_path, [one]))},
    ):
        other = build_loader(configure(**changed))
        own = other.state()
        with pytest.raises(UserError, match="another order") as refusal:
            other.load_state(state)
        differing = "seed" if own["seed"] != state["seed"] else "fingerprint"
        assert str(own[differing]) in str(refusal.value) and str(state[differing]) in str(refusal.value)


@pytest.mark.moderate
def test_validation_is_fixed_and_the_same_on_any_number_of_ranks(configure: Callable[..., Config]) -> None:
    def rows(world: int, micro_batch: int, **settings) -> dict[str, dict]:
        found: dict[str, dict] = {}
        shapes = set()
        for rank in range(world):
            batches = list(build_validation(configure(**settings), rank=rank, world=world, micro_batch=micro_batch))
            shapes.add(tuple((name, tuple(batch.input_ids.shape)) for name, batch in batches))
            for name, batch in batches:
                filler = batch.g == FILLER
                assert (batch.labels[filler] == IGNORE_LABEL).all()
                kept = Batch(batch.input_ids[~filler], batch.labels[~filler], None, batch.g[~filler])
                found.setdefault(name, {}).update(rows_by_number([kept]))
        assert len(shapes) == 1  # every rank runs as many batches of the same shapes
        return found

    alone = rows(1, 4)
    assert list(alone) == ["fly", "yeast"]
    assert len(alone["yeast"]) == 3 * (3000 // 256)
    assert rows(1, 4, train={"seed": 5}) == alone
    for world, micro_batch in ((2, 3), (3, 4), (8, 1)):
        assert rows(world, micro_batch) == alone
    few = rows(1, 4, valid={"samples": 5})
    assert [len(found) for found in few.values()] == [5, 5]
    masked = {name: set(found.values()) for name, found in alone.items()}
    assert all(set(found.values()) <= masked[name] for name, found in few.items())  # masks belong to the crop


def test_what_is_left_out_and_the_rounded_weights_are_logged(
    configure: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    loader = build_loader(configure())
    [counts] = loader._samples._order.mixture.counts
    assert (
        f"fly {counts[0]}, worm {counts[1]}" in caplog.text and "samples of each species in every 65536" in caplog.text
    )
    assert "left out: 72 bases at the ends of windows" in caplog.text  # 20,000 % 256 + 9,000 % 256
    assert "bases of each species that no crop holds: fly 10.10%, worm 0.44%" in caplog.text  # with 11 tiles of N
    caplog.clear()
    build_loader(configure(), rank=1, world=2)
    assert not caplog.text


def test_a_sequence_longer_than_every_window_is_refused(configure: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"data\.seq_len: 4097 bases, but the longest window .* has 4096"):
        build_loader(configure(seq_len=4097))
    with pytest.raises(
        UserError, match=r"data\.seq_len: 3809 .* window of species 'fly' in the split 'valid' has 3808"
    ):
        build_validation(configure(seq_len=3_809))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, r"data\.path: give a directory"),
        ([], r"data\.path: give a directory"),
        (3, r"data\.path: expected a directory, or a list"),
        ([{"weight": 1}], r"data\.path: expected a directory, or a list"),
        ([{"path": "x", "wieght": 1}], r"data\.path: expected a directory, or a list"),
        ("/nonexistent", r"/nonexistent: no complete shard dataset here"),
    ],
)
def test_paths_that_are_none(configure: Callable[..., Config], path: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_loader(configure(path=path))


def test_batches_that_do_not_divide_are_refused(configure: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch: 24 is not a multiple of train\.micro_batch 4 times 5"):
        build_loader(configure(), rank=0, world=5)
    with pytest.raises(ValueError, match="25 samples"):
        build_loader(configure()).seek(25)


def test_a_split_without_windows_is_refused(configure: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"no species of .* has windows in the split 'test'"):
        build_loader(configure(), "test")
