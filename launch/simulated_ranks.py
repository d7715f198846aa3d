"""Builds every rank of a run as the real one would, one after another in this process, without GPUs."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from caduceus.config import Config
from caduceus.config.by_step import BatchRamp
from caduceus.data.batch import RankSchedule
from caduceus.distributed.build import build_model
from caduceus.distributed.fake import fake_world
from caduceus.distributed.fsdp import shard_axis, sharding_mesh
from caduceus.distributed.held import strategy_of
from caduceus.distributed.layout import Sharing
from caduceus.distributed.ranks import Ranks


@dataclass(frozen=True)
class SimulatedRank:
    """What a rank computes and holds, and with which ranks it exchanges what."""

    rank: int
    schedule: RankSchedule
    """The samples that it draws."""
    positions: tuple[int, int]
    """First and end of its slice of each sample."""
    strand: int
    """The strand that it computes, where ranks compute one strand each."""
    groups: dict[str, tuple[int, ...]]
    """What is shared -> the ranks that share it with this one."""
    parameters: int
    """Parameters of the model that it holds between passes."""


def simulated_ranks(config: Config, world: int, sharing: Sharing, node: int) -> list[SimulatedRank]:
    """All ranks of a run, each in torch's fake process group; their models take no memory. `node`: ranks of a node."""
    strategy, holders = strategy_of(config, world, node)
    ramp = BatchRamp.of(config.train)
    shapes = [tuple(parameter.shape) for parameter in build_model(config).parameters()]
    found = []
    for rank in range(world):
        with fake_world(rank, world):
            ranks = Ranks(rank, world, sharing.context, torch.device("cpu"), None, sharing.strands)
            groups = {name: group for name, (group, _) in ranks.groups().items()}
            place = 0
            if strategy == "fsdp":
                mesh = sharding_mesh(ranks, holders)
                groups |= {f"the ranks of a {name}": mesh.get_group(name) for name in mesh.mesh_dim_names or ()}
                place = mesh.get_local_rank("shard")
            members = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
        found.append(
            SimulatedRank(
                rank,
                RankSchedule(ramp, config.train.micro_batch, ranks.data_rank, ranks.data_world),
                ranks.positions(config.data.seq_len),
                ranks.strand_rank,
                members,
                _held(tuple(shapes), place, holders) if strategy == "fsdp" else _whole(tuple(shapes)),
            )
        )
    return found


def drawn(ranks: list[SimulatedRank], consumed: int, steps: int) -> np.ndarray:
    """Sample numbers that the ranks draw in `steps` steps after `consumed` samples, in the order of the steps.

    A number occurs once for every rank that computes a part of the sample; those of a step are sorted. `consumed` must
    be the samples of whole steps.
    """
    first, found = ranks[0].schedule.ramp.steps_before(consumed), []
    for step in range(first, first + steps):
        micro_batches = np.arange(*map(ranks[0].schedule.micro_batches_before, (step, step + 1)))
        found.append(np.sort(np.concatenate([rank.schedule.samples(micro_batches).ravel() for rank in ranks])))
    return np.concatenate(found)


def refuse_gaps(ranks: list[SimulatedRank], sharing: Sharing, seq_len: int) -> None:
    """Raise `RuntimeError` unless the ranks together compute every position of every sample once, as one
    process would.
    """
    expected = np.arange(ranks[0].schedule.ramp.samples_before(2)).repeat(sharing.ranks)
    if not np.array_equal(drawn(ranks, 0, 2), expected):
        raise RuntimeError(f"{len(ranks)} ranks do not draw the samples of two steps once each")
    parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank in ranks:
        parts.setdefault((rank.schedule.rank, rank.strand), []).append(rank.positions)
    for (sample, strand), slices in parts.items():
        borders = [0, *(end for _, end in sorted(slices))]
        if [first for first, _ in sorted(slices)] != borders[:-1] or borders[-1] != seq_len:
            raise RuntimeError(f"the ranks of sample {sample}, strand {strand}, do not compute all of its positions")


@functools.lru_cache
def _held(shapes: tuple[tuple[int, ...], ...], place: int, holders: int) -> int:
    """Parameters that one of `holders` ranks holds. Torch divides an axis into equal parts, of which the last may be
    smaller.
    """
    total = 0
    for shape in shapes:
        parameter = torch.empty(shape, device="meta")
        size = shape[axis := shard_axis(parameter, holders).dim]
        part = -(-size // holders)
        total += parameter.numel() // shape[axis] * max(0, min(size, (place + 1) * part) - place * part)
    return total


@functools.lru_cache
def _whole(shapes: tuple[tuple[int, ...], ...]) -> int:
    return sum(torch.empty(shape, device="meta").numel() for shape in shapes)
