"""What changes at steps of a run: batches, mixtures and shares of masked bases; regions' weights; all exact anew."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import Config, config_from_dict, stages_of
from caduceus.config.by_step import BatchRamp
from caduceus.data.batch import RankSchedule
from caduceus.data.loader import build_loader, build_validation
from caduceus.data.order import MIXTURE_BLOCK, Mixture, StagedMixture
from caduceus.data.samples import TrainingOrder, mask_rates
from caduceus.data.split_sources import open_sources
from caduceus.distributed.layout import check_layout
from caduceus.errors import UserError
from caduceus.train.schedule import default_warmup, in_steps
from caduceus.train.trainer import train
from tests.data.batches import assert_same, take
from tests.data.shard_fixture import Species, random_bases, tile, write_dataset
from tests.distributed.layouts import Layout, train_all
from tests.distributed.layouts import config_of as config_of_layout
from tests.train.conftest import SmallRun, numbers

ramps = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=5).map(
    lambda stages: BatchRamp(
        (0, *itertools.accumulate(steps for steps, _ in stages[:-1])), tuple(12 * size for _, size in stages)
    )
)
CONTIGS = {"c0": 700, "c1": 331, "c2": 64}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(8)
    contigs = {name: random_bases(rng, length) for name, length in {**CONTIGS, "c3": 300}.items()}
    windows = [row for name, length in CONTIGS.items() for row in tile(name, length, 400)]
    splits = {"train": windows, "valid": tile("c3", 300, 400)}
    both = [Species(name, contigs, splits, strands="random") for name in ("s", "t")]
    return write_dataset(tmp_path_factory.mktemp("by-step"), both)


def config_of(shards: Path, **sections: dict) -> Config:
    values = {
        "data": {"path": str(shards), "seq_len": 64, "workers": 0},
        "train": {"global_batch": 8, "micro_batch": 4, "steps": 20},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return config_from_dict(values)


@pytest.mark.moderate
@settings(deadline=None, max_examples=30)
@given(ramp=ramps, world=st.sampled_from([1, 2, 4]))
def test_every_step_of_a_ramp_takes_the_samples_that_follow(ramp: BatchRamp, world: int) -> None:
    schedules = [RankSchedule(ramp, 3, rank, world) for rank in range(world)]
    first = 0
    for step in range(ramp.steps[-1] + 3):
        assert ramp.samples_before(step) == first and ramp.steps_before(first) == step
        assert ramp.steps_before(first + ramp.size(step) - 1) == step
        mine = []
        for schedule in schedules:
            before, count = schedule.micro_batches_before(step), schedule.per_step(step)
            assert [schedule.steps_before(before + number) for number in (0, count - 1, count)] == [
                step,
                step,
                step + 1,
            ]
            mine.append(schedule.samples(before + np.arange(count)).reshape(-1))
        assert sorted(np.concatenate(mine).tolist()) == list(range(first, first + ramp.size(step)))
        assert all((numbers % world == (first + rank) % world).all() for rank, numbers in enumerate(mine))
        first += ramp.size(step)


@pytest.mark.moderate
def test_a_loader_on_a_ramp_resumes_where_it_stopped(shards: Path) -> None:
    config = config_of(shards, train={"batch_ramp": [[0, 4], [2, 12], [3, 8]]})
    loader = build_loader(config)
    batches = take(loader, 9)
    assert np.concatenate([batch.g.numpy() for batch in batches]).tolist() == list(range(36))
    state, again = loader.state(), build_loader(config)
    assert state["samples_consumed"] == 36 and loader.per_step == 2
    again.load_state({**state, "samples_consumed": 8})
    assert (again.per_step, again.global_batch) == (3, 12)
    assert_same(batches[2:], take(again, 7))
    with pytest.raises(ValueError, match="do not make whole steps"):
        again.seek(12)


@pytest.mark.moderate
@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 2 * MIXTURE_BLOCK), min_size=1, max_size=3),
    weights=st.lists(
        st.lists(st.sampled_from([0, 0.1, 1, 3]), min_size=3, max_size=3).filter(any), min_size=4, max_size=4
    ),
    seed=st.integers(0, 9),
)
def test_each_sources_samples_follow_each_other_over_the_stages_of_a_mixture(
    lengths: list, weights: list, seed: int
) -> None:
    firsts = [0, *itertools.accumulate(lengths)]
    mixture = StagedMixture(list(zip(firsts, weights, strict=False)), seed)
    g = np.arange(firsts[-1] + 1000)
    source, k = mixture.locate(g)
    for one in range(3):
        assert (k[source == one] == np.arange((source == one).sum())).all()
    for first, end, of_stage in zip(firsts, [*firsts[1:], len(g)], weights, strict=False):
        assert all(of_stage[one] for one in set(source[first:end].tolist()))
    for cut in (0, *firsts, len(g)):
        assert mixture.drawn(cut).tolist() == np.bincount(source[:cut], minlength=3).tolist()
    alone = Mixture(weights[0], seed).locate(g[: lengths[0]])
    assert (alone[0] == source[: lengths[0]]).all() and (alone[1] == k[: lengths[0]]).all()


@pytest.mark.moderate
def test_species_weights_change_at_their_steps(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    by_step = [[0, {"t": 0}], [100, {"s": 3}], [200, {}]]
    config = config_of(shards, data={"species_weights": by_step}, train={"batch_ramp": [[0, 4], [50, 8]]})
    with caplog.at_level("INFO"):
        loader = build_loader(config)
    assert "in every 65536 in stage 1 of 3 of data.species_weights: s 65536, t 0" in caplog.text
    assert "stage 2 of 3 of data.species_weights: s 49152, t 16384" in caplog.text
    order = TrainingOrder(open_sources(config.data, "train"), config)
    source, _ = order.mixture.locate(np.arange(200_000))
    assert not source[:600].any() and source[600:].any()
    assert source[600:1400].mean() == pytest.approx(0.25, abs=0.06)
    assert source[1400:].mean() == pytest.approx(0.5, abs=0.01)
    fixed = config_of(shards, data={"species_weights": {"s": 3}})
    assert TrainingOrder(open_sources(fixed.data, "train"), fixed).mixture.counts.tolist() == [[49152, 16384]]
    assert len({loader.fingerprint, build_loader(fixed).fingerprint, build_loader(config_of(shards)).fingerprint}) == 3


def test_the_share_of_masked_bases_follows_its_schedule(shards: Path) -> None:
    config = config_of(
        shards, data={"mask_schedule": [[0, 0.8], [10, 0.2]]}, train={"batch_ramp": [[0, 4], [2, 8]], "micro_batch": 4}
    )
    rates = mask_rates(config)
    assert rates(np.array([0, 3, 4, 8, 15, 72, 10_000])) == pytest.approx([0.8, 0.8, 0.74, 0.68, 0.68, 0.2, 0.2])
    plain = config_of(shards)
    for (_, one), (_, other) in zip(build_validation(config), build_validation(plain), strict=True):
        assert one.labels.equal(other.labels)
    batches = take(build_loader(config), 60)
    shares = [float((batch.labels != IGNORE_LABEL).float().mean()) for batch in batches]
    assert np.mean(shares[:2]) > 0.7 and np.mean(shares[30:]) == pytest.approx(0.2, abs=0.03)


@pytest.mark.moderate
@pytest.mark.parametrize(("objective", "pack"), [("mlm", True), ("next_base", False)])
def test_regions_weigh_what_their_file_says(shards: Path, tmp_path: Path, pack: bool, objective: str) -> None:
    regions = [("c0", 10, 90, 0.5), ("c0", 90, 91, 4), ("c0", 395, 420, 0), ("c1", 300, 331, 2), ("elsewhere", 0, 9, 1)]
    bed = tmp_path / "weights.bed"
    bed.write_text("".join(f"{contig}\t{start}\t{end}\t{weight}\n" for contig, start, end, weight in regions))
    model = {"bidirectional": False, "rcps": False} if objective == "next_base" else {"rcps": False}
    data = {"objective": objective, "pack": pack, "crop_offset": "random", "weights_elsewhere": 0.25}
    config = config_of(shards, data={**data, "weights_bed": {"s": str(bed)}}, model=model)
    expected = {name: np.full(length, 0.25, np.float32) for name, length in CONTIGS.items()}
    for contig, start, end, weight in regions[:-1]:
        expected[contig][start:end] = weight
    loader, split_sources = build_loader(config), open_sources(config.data, "train")
    parts = [build_loader(config, positions=(first, first + 32)) for first in (0, 32)] if not pack else []
    order = TrainingOrder(split_sources, config)
    seen = set()
    for batch, *slices in zip(take(loader, 60), *(take(part, 60) for part in parts), strict=True):
        for sample, weights in zip(order.locate(batch.g.numpy()), batch.loss_weights.numpy(), strict=True):
            forward = np.full(65, np.nan, np.float32)
            pieces = split_sources.crops.pieces(int(sample["window"]), int(sample["begin"]))
            for window, begin, offset, length in zip(*pieces, strict=True):
                row = split_sources.crops.windows[window]
                start = int(row["start"]) + int(begin)
                contig = split_sources.sources[0].table.contigs[row["contig"]]
                of_species = expected[contig] if split_sources.crops.source_of(window) == 0 else np.ones(999)
                forward[offset : offset + length] = of_species[start : start + length]
            shown = forward[:64][::-1] if sample["strand"] == 1 else forward[:64]
            if objective == "next_base":
                shown = np.append(shown[1:], np.nan)
            known = ~np.isnan(shown)
            assert (weights[known] == shown[known]).all()
            seen.update(weights.tolist())
        for number, part in enumerate(slices):
            assert part.loss_weights.equal(batch.loss_weights[:, 32 * number : 32 * number + 32])
    assert seen >= {0.25, 0.5, 4, 0, 2, 1}
    assert next(iter(build_validation(config)))[1].loss_weights[:, :63].unique().tolist() == [0.25]


REFUSED = {
    "data.species_weights: no species 'x' in data.path; there are s, t": {"data": {"species_weights": {"x": 2}}},
    "from step 5 on all species have 0": {"data": {"species_weights": [[0, {}], [5, {"s": 0, "t": 0}]]}},
    "data.species_weights: expected factors by species": {"data": {"species_weights": [[0, 3]]}},
    "data.species_weights: expected a list of .step, value., whose steps go up from 0": {
        "data": {"species_weights": [[5, {}]]}
    },
    "data.mask_schedule: a share is a number above 0": {"data": {"mask_schedule": [[0, 0.2], [5, 0]]}},
    "data.mask_schedule: expected a list of .step, value.; got 0.2": {"data": {"mask_schedule": [0.2]}},
    "train.batch_ramp: ends at 4, but train.global_batch is 8": {"train": {"batch_ramp": [[0, 4]]}},
    "train.batch_ramp: 6 is not a multiple of train.micro_batch 4": {"train": {"batch_ramp": [[0, 6], [1, 8]]}},
    "train.batch_ramp: a global batch is a whole number": {"train": {"batch_ramp": [[0, 0], [1, 8]]}},
    "train.batch_ramp: parallel.strategy=deepspeed": {
        "train": {"batch_ramp": [[0, 4], [1, 8]]},
        "parallel": {"strategy": "deepspeed"},
    },
    "data.mask_span: next_base masks nothing": {
        "data": {"mask_span": 2, "objective": "next_base"},
        "model": {"bidirectional": False},
    },
    "data.mask_span: 65 bases are more than a sequence has .data.seq_len 64.": {"data": {"mask_span": 65}},
    "data.species_weights: a stream does not know": {"data": {"species_weights": {}, "mode": "stream"}},
    "data.weights_elsewhere: has no effect": {"data": {"weights_elsewhere": 0.5}},
    "train.warmup_tokens: says the same": {"train": {"warmup_tokens": 5, "warmup_steps": 1}},
    "data.weights_bed: one file, but 2 species": {"data": {"weights_bed": "a.bed"}},
    "data.weights_bed: no species 'x'": {"data": {"weights_bed": {"x": "a.bed"}}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_in_a_line(shards: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_loader(config_of(shards, **REFUSED[message]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c0 1 5 x", r"weights\.bed:1: column 4 must be a weight, a number of at least 0; got 'x'"),
        ("c0 1 5 -1", "column 4 must be a weight"),
        ("c0 1 5", "column 4 must be a weight"),
        ("c0 1 5 1\nc0 4 9 1", r"weights\.bed:2: overlaps line 1"),
        ("chr0 1 5 1", r"names no contig of s, which has c0, c1, c2"),
        (
            "c0 1 5 1\nc1 1 999 2",
            r"weights\.bed:2: ends at 999, beyond c1 with \d+ bases; it may be for another assembly",
        ),
        (
            "".join(f"{contig} 0 {length} 0\n" for contig, length in CONTIGS.items()),
            "all bases of species 's' in the split 'train' have weight 0, so that none counts",
        ),
    ],
)
def test_a_file_of_weights_that_cannot_be_meant_is_refused(
    shards: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "weights.bed").write_text(text)
    with pytest.raises(UserError, match=message):
        build_loader(config_of(shards, data={"weights_bed": {"s": str(tmp_path / "weights.bed")}}))


def test_a_file_of_weights_is_looked_at_before_training(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bed = tmp_path / "weights.bed"
    bed.write_text("c0 1 5 2\nchr0 1 5 1\nchr9 1 5 1\n")
    config = config_of(shards, data={"weights_bed": {"s": str(bed)}, "weights_elsewhere": 0.0})
    with pytest.raises(UserError, match="all bases of species 's' in the split 'valid' have weight 0"):
        build_validation(config)
    assert "lacks" not in caplog.text
    build_loader(config)
    assert f"data.weights_bed: 2 of 3 rows of {bed} are on contigs that s lacks: chr0, chr9" in caplog.text


@pytest.mark.moderate
def test_a_warm_up_in_bases_is_as_many_steps_as_take_them(shards: Path) -> None:
    for tokens, steps in ((0, 0), (1, 1), (256, 1), (257, 2), (512, 2), (513, 3), (1024, 3), (1025, 4)):
        config = config_of(shards, train={"batch_ramp": [[0, 4], [2, 8]], "warmup_tokens": tokens})
        assert default_warmup(in_steps(config)) == steps, tokens
    assert default_warmup(in_steps(config_of(shards))) == 2


def test_stages_have_mixtures_and_ramps_of_their_own(shards: Path) -> None:
    stages = [
        {"steps": 4, "species_weights": {"t": 0}, "mask_prob": 0.3},
        {"steps": 4, "global_batch": 16, "batch_ramp": [[0, 8], [2, 16]]},
    ]
    first, second = (stage.config for stage in stages_of(config_of(shards, train={"steps": 8, "stages": stages})))
    counts = [TrainingOrder(open_sources(one.data, "train"), one).mixture.counts.tolist() for one in (first, second)]
    assert counts == [[[65536, 0]], [[32768, 32768]]]
    assert (first.data.mask_prob, second.data.mask_prob) == (0.3, 0.15)
    assert BatchRamp.of(second.train) == BatchRamp((0, 2), (8, 16)) and BatchRamp.of(first.train).sizes == (8,)
    with pytest.raises(UserError, match=r"stage 2: train\.batch_ramp: ends at 8, but train\.global_batch is 16"):
        config_of(shards, train={"steps": 8, "stages": [stages[0], {**stages[1], "batch_ramp": [[0, 8]]}]})


def test_a_layout_must_divide_every_batch_of_a_ramp(shards: Path) -> None:
    config = config_of(shards, train={"batch_ramp": [[0, 4], [2, 8]]}, parallel={"context": 1, "strands": 1})
    assert check_layout(config_of(shards, parallel={"context": 1, "strands": 1}), 2).ranks == 1
    with pytest.raises(UserError, match=r"train\.batch_ramp: .*is not a multiple of train\.micro_batch 4 x 2"):
        check_layout(config, 2)


EVERYTHING = {
    "crop_offset": "random",
    "mask_span": 4,
    "mask_schedule": [[0, 0.5], [4, 0.2]],
    "species_weights": [[0, {"t": 0.5}], [2, {"t": 4}]],
    "min_acgt": 0.0,
}
RAMP = [[0, 2], [1, 4], [3, 8]]


def with_everything(config: Config, shards: Path, bed: Path) -> Config:
    bed.write_text("c0\t100\t500\t0.3\n")
    data = replace(config.data, path=str(shards), seq_len=64, **EVERYTHING, weights_bed={"s": str(bed)})
    optimization = replace(config.train, batch_ramp=RAMP, global_batch=8, micro_batch=1)
    return replace(config, data=data, train=optimization)


@pytest.mark.moderate
def test_a_resume_has_the_numbers_of_a_run_without(shards: Path, tmp_path: Path) -> None:
    small = SmallRun(shards, tmp_path)

    def config(name: str, steps: int) -> Config:
        found = small.config(name, train={"steps": steps, "schedule": "constant"}, valid={"every": 2})
        return with_everything(found, shards, tmp_path / "weights.bed")

    assert train(config("whole", 4)) == 0
    assert train(config("parts", 2)) == 0
    longer = config("parts", 4)
    longer.run.allow_change = ["train.steps"]
    assert train(longer) == 0
    rows = numbers(tmp_path / "whole")
    assert numbers(tmp_path / "parts") == rows
    steps = [row for row in rows if "loss" in row]
    assert [row["samples"] for row in steps] == [2, 6, 10, 18]
    assert [row["tokens"] for row in steps] == [128, 384, 640, 1152]


@pytest.mark.slow
def test_ranks_have_the_losses_of_one_process(shards: Path, tmp_path: Path) -> None:
    losses = {}
    for layout in (Layout("one", 1, {"strategy": "single"}), Layout("ddp", 2, {"strategy": "ddp"})):
        sharing = [("strands", {"strategy": "ddp", "strands": 2}), ("fsdp", {"strategy": "fsdp"})] * (layout.world > 1)
        layouts = [layout, *(replace(layout, name=name, parallel=parallel) for name, parallel in sharing)]
        configs = [config_of_layout(one, shards, tmp_path / one.name, steps=4, precision="fp64") for one in layouts]
        configs = [with_everything(config, shards, tmp_path / "weights.bed") for config in configs]
        train_all(layout.world, configs)
        for config in configs:
            losses[config.run.name] = [row["loss"] for row in numbers(config.run.dir)]
    for name in ("ddp", "strands", "fsdp"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-9), name
