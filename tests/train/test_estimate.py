import itertools
import re

import pytest
import torch
import torch.distributed as dist

from caduceus import CaduceusForMaskedLM
from caduceus.config import CaduceusConfig, config_from_dict
from caduceus.distributed import ranks as ranks_module
from caduceus.distributed.layout import check_layout
from caduceus.distributed.ranks import Ranks
from caduceus.model.costs import parameter_count
from caduceus.train.estimate import BLOCK_SECONDS, REST_SECONDS, estimate, seconds_per_base
from caduceus.train.recomputation import bytes_added_by_a_block
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    "keys",
    [
        {"d_model": 32, "n_layer": 2},
        {"d_model": 24, "n_layer": 3, "rcps": True},
        {"d_model": 32, "n_layer": 1, "bidirectional_weight_tie": False},
        {"d_model": 16, "n_layer": 2, "bidirectional": False},
        {"d_model": 16, "n_layer": 2, "rms_norm": False, "d_state": 8, "expand": 3},
    ],
)
def test_parameters_are_counted_as_the_model_has_them(keys):
    config = CaduceusConfig(**keys)
    model = CaduceusForMaskedLM(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


def published(seq_len: int, rcps: bool = False, strands: int = 1, context: int = 1, **train):
    return config_from_dict(
        {
            "model": {"d_model": 256, "n_layer": 16, "rcps": rcps},
            "parallel": {"strands": strands, "context": context},
            "data": {"seq_len": seq_len},
            "train": {"global_batch": 2**20 // seq_len * 8, "micro_batch": 1, "precision": "bf16", **train},
        }
    )


@pytest.mark.moderate
def test_memory_at_the_published_sizes():
    # As benchmarks/memory.py counts for the 7.7M model.
    assert estimate(published(2**17), 8).memory_bytes == pytest.approx(20.03 * 2**30, rel=0.02)
    assert estimate(published(2**20), 8).memory_bytes == pytest.approx(152.45 * 2**30, rel=0.02)
    recomputed = estimate(published(2**20, activation_checkpointing="block"), 8)
    assert recomputed.memory_bytes == pytest.approx(33.13 * 2**30, rel=0.02)
    recomputed = estimate(published(2**20, activation_checkpointing="scan"), 8)
    assert recomputed.memory_bytes == pytest.approx(89.63 * 2**30, rel=0.02)


@pytest.mark.moderate
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("keys", [{}, {"rcps": True}, {"bidirectional_weight_tie": False}, {"bidirectional": False}])
def test_memory_on_a_cpu_grows_by_what_a_block_keeps_there(keys, precision):
    """The block recomputes nothing, or what feeds the scan; the real model's memory is counted in the same way."""

    def config(layers: int, mode: str = "none"):
        train = {"activation_checkpointing": mode, "precision": precision, "global_batch": 2, "micro_batch": 2}
        model = {"d_model": 64, "n_layer": layers, **keys}
        return config_from_dict({"model": model, "data": {"seq_len": 512}, "train": train})

    lean, full = bytes_added_by_a_block(config(1), Ranks(0, 1, 1, torch.device("cpu")))
    residual = (2 if keys.get("rcps") else 1) * 2 * 512 * 64 * (8 if precision == "fp64" else 4)
    weights = 16 * (parameter_count(config(2).model) - parameter_count(config(1).model))
    for mode, kept in (("none", full), ("scan", lean), ("block", 0)):
        few, many = (estimate(config(layers, mode), 1, gpus=False).memory_bytes for layers in (2, 3))
        # In bf16 less is recomputed on a CPU than is said to be; the estimate is then on the safe side.
        least, most = (0.9, 1.3 if precision == "bf16" else 1.05)
        assert least < (many - few) / 1.1 / (weights + residual + kept) < most, mode


def test_memory_of_a_process_on_a_cpu():
    """As tests/train/resident.py measures resident memory, with the weights and libraries of a small process."""
    keys = {"model": {"d_model": 32, "n_layer": 4, "rcps": True}, "data": {"seq_len": 16_384}}
    for mode, measured in (("none", 492e6), ("block", 180e6)):
        train = {"activation_checkpointing": mode, "global_batch": 1, "micro_batch": 1, "precision": "fp32"}
        found = estimate(config_from_dict({**keys, "train": train}), 1, gpus=False)
        assert found.memory_bytes - 2**29 == pytest.approx(measured, rel=0.1), mode


@pytest.mark.moderate
def test_auto_recomputes_what_does_not_fit_a_gpu():
    def modes(seq_len: int) -> list:
        modes = ("none", "auto", "scan", "block")
        return [estimate(published(seq_len, activation_checkpointing=mode), 8) for mode in modes]

    none, auto, scan, block = modes(2**17)
    assert auto == none and none.step_seconds < scan.step_seconds < block.step_seconds
    # What feeds the scan is enough, in some of the blocks.
    none, auto, scan, block = modes(2**19)
    assert none.step_seconds < auto.step_seconds < scan.step_seconds
    assert block.memory_bytes < scan.memory_bytes < auto.memory_bytes < 0.9 * 80e9 < none.memory_bytes
    none, auto, scan, block = modes(2**20)
    assert none.step_seconds < scan.step_seconds < auto.step_seconds < block.step_seconds
    assert block.memory_bytes < auto.memory_bytes < 0.9 * 80e9 < scan.memory_bytes < none.memory_bytes


def test_time_follows_the_work_of_a_rank():
    one = estimate(published(2**17), 8)
    assert one.sequences == 8 and one.step_seconds == pytest.approx(8 * 2**17 * seconds_per_base(256, 16))
    assert estimate(published(2**17), 16).step_seconds == pytest.approx(one.step_seconds / 2)
    assert seconds_per_base(512, 33) == pytest.approx(2 * (33 * BLOCK_SECONDS + REST_SECONDS) * 256)
    recomputed = estimate(published(2**17, activation_checkpointing="block"), 8).step_seconds
    assert recomputed == pytest.approx(8 * 2**17 * seconds_per_base(256, 16 * 4 / 3))


def test_the_time_is_that_of_the_newest_record_of_machine_code():
    """What `benchmarks/sass.py` printed last without options, to its last digit."""
    newest = max((REPOSITORY / "benchmarks").glob("sass_*.md"))
    of_now = newest.read_text().rpartition("\n## Now\n")[2]
    rows = dict(re.findall(r"^(A block|Embedding), .* (\d+) ns per token", of_now, re.MULTILINE)[:2])
    found = {"A block": BLOCK_SECONDS * 256e9, "Embedding": REST_SECONDS * 256e9}
    assert found == pytest.approx({name: int(nanoseconds) for name, nanoseconds in rows.items()})


def test_a_strand_takes_half_of_the_time_and_of_the_activations_of_both():
    keys = ({}, {"rcps": True}, {"rcps": True, "strands": 2})
    one, both, apart = (estimate(published(2**17, **its), 8) for its in keys)
    # Ranks in pairs have twice as many sequences each.
    assert apart.sequences == 2 * both.sequences and apart.bases == both.bases
    assert both.step_seconds == pytest.approx(2 * one.step_seconds)
    assert apart.step_seconds == pytest.approx(both.step_seconds)
    assert apart.memory_bytes == one.memory_bytes < 0.6 * both.memory_bytes


@pytest.mark.parametrize("strands", [1, 2])
@pytest.mark.parametrize(("millions", "context"), [(1, 8), (2, 16), (4, 32), (8, 64)])
def test_contexts_of_millions_of_bases(millions, context, strands, monkeypatch):
    seq_len, world = millions * 2**20, context * strands
    config = published(seq_len, rcps=strands == 2, strands=strands, context=context, global_batch=1)
    check_layout(config, world)
    monkeypatch.setattr(dist, "new_group", lambda **kwargs: None)  # which would want the other processes
    monkeypatch.setattr(ranks_module, "group_of", lambda *arguments: None)
    ranks = [Ranks(rank, world, context, torch.device("cpu"), strands=strands) for rank in range(world)]
    for strand in range(strands):
        slices = sorted(rank.positions(seq_len) for rank in ranks if rank.strand_rank == strand)
        assert {end - first for first, end in slices} == {2**17} and len(slices) == context
        assert slices[0][0] == 0 and slices[-1][1] == seq_len
        assert all(one[1] == next_one[0] for one, next_one in itertools.pairwise(slices))
    # A GPU keeps what it keeps of a sequence that is no longer than its slice, and works as long.
    shared, alone = estimate(config, world), estimate(published(2**17, global_batch=8), 8)
    assert (shared.sequences, shared.bases) == (1, 2**17)
    assert shared.memory_bytes == alone.memory_bytes < 0.9 * 80e9
    assert shared.step_seconds == pytest.approx(alone.step_seconds)
