"""A run on many nodes as it is simulated: who draws what, what layouts cost, and which one `auto` takes."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard

from caduceus.config import CaduceusConfig, Config, config_from_dict, load_config
from caduceus.data.loader import build_loader
from caduceus.data.samples import TrainingOrder
from caduceus.data.split_sources import open_sources
from caduceus.distributed.build import build_model
from caduceus.distributed.fake import fake_world
from caduceus.distributed.fsdp import shard_axis, sharding_mesh
from caduceus.distributed.layout import Room, Sharing, check_layout
from caduceus.distributed.network import Network
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.model import costs
from launch.simulated_ranks import SimulatedRank, drawn, refuse_gaps, simulated_ranks
from launch.simulation import efficiencies, fastest, series
from launch.step_model import asked
from tests import preloaded
from tests.conftest import REPOSITORY

NETWORK = Network()
EIGHT = Sharing(strands=2, context=4)


def config_of(shards: Path, batch: int, **parallel: object) -> Config:
    return config_from_dict(
        {
            "model": {"d_model": 16, "n_layer": 1, "rcps": True},
            "data": {"path": str(shards), "seq_len": 64, "workers": 0},
            "train": {"global_batch": batch, "micro_batch": 1},
            "parallel": {"strategy": "fsdp", "shard": 8, "strands": 2, "context": 4, **parallel},
        }
    )


@pytest.mark.slow
def test_512_ranks_draw_what_one_process_draws_also_when_504_go_on(small_shards: Path) -> None:
    """A node of 64 is lost after three steps; the batch divides by the data-parallel ranks of both, 64 and 63."""
    config = config_of(small_shards, batch=64 * 63)
    order = TrainingOrder(open_sources(config.data, "train"), config)
    found, consumed = [], 0
    for world, steps in ((512, 3), (504, 2)):
        ranks = simulated_ranks(config, world, EIGHT, node=8)
        refuse_gaps(ranks, EIGHT, config.data.seq_len)
        numbers = drawn(ranks, consumed, steps)
        assert np.array_equal(numbers, np.arange(consumed, consumed + steps * 4032).repeat(EIGHT.ranks))
        found.append(numbers[:: EIGHT.ranks])
        check_loader(config, ranks, consumed)
        consumed += steps * 4032
    one = order.locate(np.arange(consumed))
    assert np.array_equal(order.locate(np.concatenate(found)), one)


def check_loader(config: Config, ranks: list[SimulatedRank], consumed: int) -> None:
    """The loader that a rank trains from gives the samples that it is said to draw: of the first and last rank."""
    for simulated in (ranks[0], ranks[-1]):
        schedule = simulated.schedule
        loader = build_loader(
            config, "train", rank=schedule.rank, world=schedule.world, positions=simulated.positions, device="cpu"
        )
        loader.load_state({**loader.state(), "samples_consumed": consumed})
        first = schedule.micro_batches_before(schedule.ramp.steps_before(consumed))
        batches = itertools.islice(loader, 2)
        assert [batch.g.tolist() for batch in batches] == schedule.samples(np.arange(first, first + 2)).tolist()


def test_a_sample_that_nobody_draws_is_told(small_shards: Path) -> None:
    config = config_of(small_shards, batch=16)
    ranks = simulated_ranks(config, 16, EIGHT, node=8)
    refuse_gaps(ranks, EIGHT, 64)
    with pytest.raises(RuntimeError, match="7 ranks do not draw the samples"):
        refuse_gaps(ranks[:7], EIGHT, 64)
    with pytest.raises(RuntimeError, match="do not compute all of its positions"):
        refuse_gaps(ranks, EIGHT, 80)


@pytest.mark.parametrize(("world", "shard", "d_model"), [(16, 8, 16), (16, 0, 24), (6, 3, 16)])
def test_ranks_hold_what_is_sharded_to_them(world: int, shard: int, d_model: int, small_shards: Path) -> None:
    config = config_of(small_shards, batch=world, shard=shard, strands=1, context=1)
    config.model = CaduceusConfig(d_model=d_model, n_layer=1, rcps=True)
    ranks = simulated_ranks(config, world, Sharing(1, 1), node=8)
    holders = shard or world
    for rank in {0, 1, world - 1}:
        with fake_world(rank, world):
            mesh = sharding_mesh(Ranks(rank, world, 1, torch.device("cpu")), shard)
            model = build_model(config)
            fully_shard(model, mesh=mesh, shard_placement_fn=lambda parameter: shard_axis(parameter, holders))
            held = sum(parameter.to_local().numel() for parameter in model.parameters())
        assert ranks[rank].parameters == held
        copies = ranks[rank].groups.get("the ranks of a replicate", (rank,))
        assert copies == tuple(range(rank % holders, world, holders))


PRESETS = {
    "ph-131k": [],
    "ph-1m": [],
    "ph-1m, a batch of 8": ["train.global_batch=8"],
    "ps-131k": [],
    "ps-1m": [],
    "ps-131k, 300M, nothing recomputed": ["size=300M"],
    "plantcad2-medium": ["data.path=x"],
}


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_no_layout_is_faster_than_that_of_auto(name: str, grows: bool) -> None:
    config = load_config(name.partition(",")[0], PRESETS[name])
    steps = [step for nodes, step in series(config, 64, NETWORK, grows) if nodes in (1, 8, 64)]
    for step in steps:
        assert step.fits and fastest(step, NETWORK) is None, step.layout
        assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert efficiencies(list(enumerate(steps)))[0] == 1


def test_a_layout_that_is_faster_is_told() -> None:
    """As it was with the fewest ranks to a sequence, whose blocks are then computed again."""
    config = load_config("ph-1m", ["train.global_batch=8", "parallel.context=1", "parallel.strands=1"])
    step = asked(config, 8, NETWORK)
    assert sum(step.estimate.footprint.recomputed) > 0
    best = fastest(step, NETWORK)
    assert best is not None and best.estimate.shared_by.context == 4
    assert best.seconds < 0.9 * step.seconds


@pytest.mark.moderate
def test_auto_shares_a_sequence_further_where_it_would_not_fit() -> None:
    """With nothing recomputed; and where a layout is asked for that does not fit, one that does is told."""
    config, room = load_config("ps-131k", ["size=300M"]), Room(80 * 10**9, 8)
    assert check_layout(config, 8, room) == Sharing(2, 4)
    assert check_layout(config, 8, Room(10**12, 8)) == check_layout(config, 8) == Sharing(1, 1)
    assert check_layout(load_config("ps-131k", ["size=300M", "parallel.context=1"]), 8, room) == Sharing(1, 1)
    step = asked(load_config("ps-131k", ["size=300M", "parallel.context=1", "parallel.strands=1"]), 8, NETWORK)
    best = fastest(step, NETWORK)
    assert not step.fits and best is not None and best.fits and best.estimate.shared_by == Sharing(2, 4)


@pytest.mark.moderate
def test_auto_shares_a_sequence_further_where_it_would_be_computed_again() -> None:
    """It takes no more ranks than a node has and no short slices, and only where nobody asked for less."""
    room = Room(80 * 10**9, 8)
    config = load_config("ph-1m", ["train.global_batch=8"])
    assert check_layout(config, 8, room) == Sharing(1, 4)
    assert check_layout(config, 8) == Sharing(1, 1)
    assert check_layout(config, 8, Room(10**12, 8)) == Sharing(1, 1)
    assert check_layout(config, 8, Room(80 * 10**9, 2)) == Sharing(1, 2)
    for key in ("parallel.context=1", "train.activation_checkpointing=block"):
        assert check_layout(load_config("ph-1m", ["train.global_batch=8", key]), 8, room) == Sharing(1, 1)
    short = load_config(
        "ph-32k", ["train.micro_batch=16", "train.global_batch=128", "train.activation_checkpointing=auto"]
    )
    assert check_layout(short, 8, Room(40 * 10**9, 8)) == Sharing(1, 2)


@pytest.mark.slow
def test_kernels_are_counted_as_they_are_launched() -> None:
    """In a process of its own, as what it patches stays patched. By formula within 4 of 100."""
    pytest.importorskip("triton")
    program = REPOSITORY / "tests" / "model" / "launched.py"
    printed = preloaded.run([sys.executable, program], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert len(rows) == 5
    for row in rows:
        model = CaduceusConfig(**row["model"])
        chunks = row["length"] // 64
        foretold = costs.launches(model, costs.streams(model), chunks, row["shared"], tuple(row["recomputed"]))
        assert foretold == pytest.approx(row["launches"], rel=0.04), row


def test_the_command_prints_all_of_it_and_leaves_nothing(launch, capsys, tmp_path: Path) -> None:
    request, before = ("--nodes", "2", "--cluster", "h100x8", "--config", "ph-1m"), set(tmp_path.rglob("*"))
    assert launch(*request, "--dry-run", "--simulate") == 0
    printed = capsys.readouterr().out
    assert "# 16 ranks on 2 nodes" in printed and "ddp, context 16" in printed and "1 nodes |" in printed
    assert "| the ranks that share its strand | 1 | 16 | 2 |" in printed
    assert "| all-gather | states | the slices of a strand (16 on 2 nodes) |" in printed
    assert "Unmeasured, by a model" in printed
    assert set(tmp_path.rglob("*")) == before
    for wrong, told in (
        ((*request, "--simulate"), "--simulate: give it with --dry-run, as it submits nothing"),
        ((*request, "--dry-run", "--simulate", "--gpus-per-node", "0"), "--simulate: computes times of GPUs only"),
        ((*request, "--dry-run", "--simulate", "--sweep", "train.lr=1,2"), "--simulate: shows one run"),
    ):
        with pytest.raises(UserError, match=told):
            launch(*wrong)
