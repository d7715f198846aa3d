"""A small model of the time of a step on many nodes, and of what bounds it. Nothing here is measured.

A rank computes for the time of `caduceus.train.estimate`, but never faster than Python launches kernels. Collectives of
gradients and sharded parameters overlap with this computation while it lasts, except the last of the gradients and the
first of the parameters; all others are waited for. The update reads and writes the rank's part of the model at the
bandwidth of the GPU's memory.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from caduceus.config import Config
from caduceus.config.model import CHUNK
from caduceus.distributed.costs import Exchange, exchanges, micro_batches_per_step
from caduceus.distributed.footprint import RESERVE
from caduceus.distributed.held import held, strategy_of
from caduceus.distributed.layout import Room, Sharing, check_layout, with_sharing
from caduceus.distributed.network import Network
from caduceus.errors import UserError
from caduceus.model import costs
from caduceus.train.estimate import GPU_BYTES, Estimate, estimate

LAUNCH_SECONDS = 5e-6
"""CPU time, in seconds, that launching a kernel takes in an eager PyTorch program."""
MEMORY_RATE = 3.35e12
"""Bytes per second of an H100 SXM's memory, from its data sheet."""
UPDATE_BYTES = 40
"""Bytes that an update moves per fp32 parameter: the gradient is read for the norm and scaled; AdamW reads four numbers
and writes three. For optimizers that keep more or fewer numbers, they count in proportion.
"""
COPIES = 3
"""Kernel launches of a collective with copies before and after it."""
BACKWARD = 2 / 3
"""Share of the forward pass in a micro-batch's time."""


@dataclass(frozen=True)
class Step:
    """The step of a layout of ranks."""

    config: Config
    """The configuration; its `parallel` is the layout, without `auto`."""
    estimate: Estimate
    parts: dict[str, float]
    """What the rank does, or waits for -> seconds."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it fits a GPU's memory, with a reserve."""
        return self.estimate.memory_bytes <= (1 - RESERVE) * GPU_BYTES

    @property
    def bound(self) -> str:
        """The part that takes most of the step."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def bases_per_rank(self) -> float:
        """Bases per second of a rank."""
        train = self.config.train
        return train.global_batch * self.config.data.seq_len / self.seconds / self.estimate.world

    @property
    def layout(self) -> str:
        """The strategy, and how many ranks share what, in a few words."""
        parallel, sharing = self.config.parallel, self.estimate.shared_by
        words = [parallel.strategy]
        if parallel.strategy == "fsdp":
            words = [f"fsdp {parallel.shard or self.estimate.world}"]
        if parallel.strategy == "deepspeed":
            words = [f"ZeRO {parallel.zero_stage}"]
        words += [f"strands {sharing.strands}"] * (sharing.strands > 1)
        words += [f"context {sharing.context}"] * (sharing.context > 1)
        return ", ".join(words)


def asked(config: Config, world: int, network: Network) -> Step:
    """The step of the layout that a run of `config` takes on `world` ranks.

    Raises `UserError` where none is possible.
    """
    sharing = check_layout(config, world, Room(GPU_BYTES, network.node))
    strategy, holders = strategy_of(config, world, network.node)
    shard = (holders if holders < world else 0) if strategy == "fsdp" else config.parallel.shard
    return _step(_with(config, strategy, shard, config.parallel.zero_stage, sharing), world, network)


def layouts(config: Config, world: int, network: Network) -> Iterator[Step]:
    """The steps of all layouts that are possible on `world` ranks, whatever `config` asks for."""
    strategies = [("ddp", 0, 0), ("fsdp", 0, 0), *(("deepspeed", 0, stage) for stage in (1, 2, 3))]
    if network.node < world and world % network.node == 0:
        strategies.append(("fsdp", network.node, 0))
    if world == 1:
        strategies = [("single", 0, 0)]
    divisors = [count for count in range(1, world + 1) if world % count == 0]
    for strands, context in itertools.product((1, 2) if config.model.rcps else (1,), divisors):
        for strategy, shard, stage in strategies:
            arranged = _with(config, strategy, shard, stage, Sharing(strands, context))
            try:
                check_layout(arranged, world)
            except UserError:
                break
            yield _step(arranged, world, network)


def _with(config: Config, strategy: str, shard: int, stage: int, sharing: Sharing) -> Config:
    arranged = with_sharing(config, sharing)
    arranged.parallel.strategy, arranged.parallel.shard, arranged.parallel.zero_stage = strategy, shard, stage
    return arranged


def _step(config: Config, world: int, network: Network) -> Step:
    found = estimate(config, world, node=network.node)
    sharing, passes = found.shared_by, micro_batches_per_step(config, world)
    streams = costs.streams(config.model) // sharing.strands
    chunks = -(-config.data.seq_len // sharing.context // CHUNK)
    launched = costs.launches(config.model, streams, chunks, sharing.context > 1, found.footprint.recomputed)
    collectives = exchanges(config, world, network.node, found.footprint.recomputed)
    calls = sum(exchange.times * (COPIES if exchange.behind else 1) for exchange in collectives)
    launching = (passes * launched + calls) * LAUNCH_SECONDS
    computing = max(found.step_seconds, launching)
    parts = {"computing" if found.step_seconds >= launching else "launching kernels": computing}
    windows = {
        "passes": computing,
        "backward passes": BACKWARD * computing,
        "last backward pass": BACKWARD * computing / passes,
    }
    for behind in ("", *windows):
        for name, seconds in _waits([e for e in collectives if e.behind == behind], windows.get(behind), network):
            parts[name] = parts.get(name, 0.0) + seconds
    parts["update"] = UPDATE_BYTES / (4 * costs.MOMENTS) * held(config, world, network.node).states / MEMORY_RATE
    return Step(config, found, parts)


def _waits(collectives: list[Exchange], window: float | None, network: Network) -> Iterator[tuple[str, float]]:
    """(what is waited for, seconds) for collectives that overlap with the same computation, or with none."""
    times = [(exchange, network.seconds(exchange)) for exchange in collectives]
    if window is None:
        for exchange, seconds in times:
            yield f"{exchange.what} between {exchange.group.name}", exchange.times * seconds
    elif times:
        longest, _ = max(times, key=lambda pair: pair[0].times * pair[1])
        total = sum(exchange.times * seconds for exchange, seconds in times)
        alone = times[-1][1]
        yield f"{longest.what} between {longest.group.name}", max(alone, total - window)
