"""What a layout costs each rank: the collectives of a step.

They are counted from the configuration, for parameters and gradients in fp32. Imports no torch.
"""

from dataclasses import dataclass, replace

from caduceus.config import Config
from caduceus.distributed.held import strategy_of
from caduceus.distributed.layout import check_layout
from caduceus.model.costs import block_parameters, parameter_count, streams

_FP32, _FP64 = 4, 8
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes of gradients in the first bucket of DDP and in the later ones, to the nearest whole parameters."""
WHOLE_BUCKET = 4 * 500_000_000
"""The same for DeepSpeed, where it divides nothing."""


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in each kind of collective in a step, without the few numbers on which ranks agree."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    @property
    def total(self) -> int:
        return self.all_reduce + self.all_gather + self.reduce_scatter


@dataclass(frozen=True)
class Group:
    """Ranks that exchange with each other: `size` ranks at distances of `stride`."""

    name: str
    size: int
    stride: int = 1


@dataclass(frozen=True)
class Exchange:
    """A collective that a rank takes part in."""

    kind: str
    """all-reduce, all-gather, reduce-scatter or broadcast."""
    what: str
    """gradients, parameters, edges, states, logits or agreement."""
    group: Group
    bytes: int
    """Bytes that the rank sends each time."""
    times: int
    """Number of times in a step."""
    behind: str = ""
    """What the rank computes meanwhile: passes, backward passes, or the last backward pass; empty where it waits.

    Of several with the same text, the last one listed happens when nothing is left to compute, or before anything has
    begun.
    """


def sent(config: Config, world: int, node: int = 0) -> Sent:
    """What a rank sends in the collectives of a step without recomputation.

    For ZeRO 3 it is an upper bound: small parameters stay gathered, and so does the last block between its two passes.
    """
    given = dict.fromkeys(("all-reduce", "all-gather", "reduce-scatter"), 0)
    for exchange in exchanges(config, world, node):
        if exchange.what != "agreement":
            given[exchange.kind] += exchange.times * exchange.bytes
    return Sent(*given.values())


def exchanges(config: Config, world: int, node: int = 0, recomputed: tuple[int, int] = (0, 0)) -> list[Exchange]:
    """The collectives of a step; `recomputed`: how many blocks recompute everything, and how many the inputs of the
    scan.

    `node`: ranks of a node (0: all), which decides how `auto` shares parameters.
    """
    if world == 1:
        return []
    strategy, holders = strategy_of(config, world, node)
    passes = micro_batches_per_step(config, world)
    of_parameters = {"fsdp": _of_fsdp, "deepspeed": _of_zero}.get(strategy, _of_ddp)
    found = of_parameters(config, world, holders, passes)
    found += _of_strands(config, world, passes) + _of_context(config, world, passes, *recomputed)
    everyone = Group("all ranks", world)
    found.append(Exchange("all-gather", "agreement", everyone, 2 * _FP64, 2))
    found.append(Exchange("all-reduce", "agreement", everyone, _FP64, 1))
    return [exchange for exchange in found if exchange.bytes and exchange.times]


def _of_ddp(config: Config, world: int, holders: int, passes: int) -> list[Exchange]:
    whole, everyone = _FP32 * parameter_count(config.model), Group("all ranks", world)
    first = min(whole, FIRST_BUCKET)
    others, last = divmod(whole - first, BUCKET)
    bucket = Exchange("all-reduce", "gradients", everyone, BUCKET, others, "last backward pass")
    return [replace(bucket, bytes=first, times=1), bucket, replace(bucket, bytes=last, times=1)]


def _of_fsdp(config: Config, world: int, holders: int, passes: int) -> list[Exchange]:
    """Blocks are gathered for each pass, the rest once; gradients are exchanged in the last micro-batch."""
    layers = config.model.n_layer
    block, rest = _parts(config)
    sharing = Group("the ranks that share parameters", holders)
    copies = Group("the ranks with the same part", world // holders, holders)
    gather = Exchange("all-gather", "parameters", sharing, block // holders, 2 * layers * passes, "passes")
    reduce = Exchange("reduce-scatter", "gradients", sharing, block, layers, "last backward pass")
    found = [replace(gather, bytes=rest // holders, times=passes), gather]
    found += [replace(reduce, bytes=rest, times=1), reduce]
    if copies.size > 1:
        meet = Exchange("all-reduce", "gradients", copies, block // holders, layers, "last backward pass")
        found += [replace(meet, bytes=rest // holders, times=1), meet]
        found.append(Exchange("broadcast", "agreement", copies, _FP32, 1))
    return [*found, Exchange("all-reduce", "agreement", sharing, _FP32, 1)]


def _of_zero(config: Config, world: int, holders: int, passes: int) -> list[Exchange]:
    stage, layers = config.parallel.zero_stage, config.model.n_layer
    block, rest = _parts(config)
    everyone = Group("all ranks", world)
    meet = Exchange("all-reduce", "gradients", everyone, block, layers)
    if stage == 0:
        full, last = divmod(layers * block + rest, WHOLE_BUCKET)
        return [replace(meet, bytes=WHOLE_BUCKET, times=full), replace(meet, bytes=last, times=1)]
    if stage < 3:
        times = passes if stage == 2 else 1
        found = [replace(meet, times=layers * times), replace(meet, bytes=rest, times=times)]
        whole = layers * block + rest
        return [*found, Exchange("all-gather", "parameters", everyone, whole // world, 1)]
    gather = Exchange("all-gather", "parameters", everyone, block // world, 2 * layers * passes, "passes")
    reduce = Exchange("reduce-scatter", "gradients", everyone, block, layers * passes, "backward passes")
    found = [replace(gather, bytes=rest // world, times=passes), gather]
    return [*found, replace(reduce, bytes=rest, times=passes), reduce]


def _parts(config: Config) -> tuple[int, int]:
    """Bytes of the parameters of a block, and of those outside the blocks."""
    block = _FP32 * block_parameters(config.model)
    return block, _FP32 * parameter_count(config.model) - config.model.n_layer * block


def _of_strands(config: Config, world: int, passes: int) -> list[Exchange]:
    model, sharing = config.model, check_layout(config, world)
    if sharing.strands == 1:
        return []
    sequences = config.train.micro_batch
    labels = round(config.data.mask_prob * sequences * config.data.seq_len / sharing.context)
    logits = max(_element(config), _FP32) * labels * model.padded_vocab_size
    group = Group("the strands of a slice", sharing.strands, sharing.context)
    return [Exchange("all-reduce", "logits", group, logits, passes)]


def _of_context(config: Config, world: int, passes: int, whole: int, inputs: int) -> list[Exchange]:
    """What the slices of a strand exchange in every layer, forward and backward."""
    model, sharing = config.model, check_layout(config, world)
    if sharing.context == 1:
        return []
    layers, element = model.n_layer, _element(config)
    rows = streams(model) // sharing.strands * config.train.micro_batch
    two = model.mixer == "mamba2"  # it also convolves B and C, and has one step size per head
    channels = model.d_inner + (2 * model.d_state if two else 0)
    edges = element * rows * channels * 2 * (model.d_conv - 1)
    number = max(element, _FP32) * rows * (2 if model.bidirectional else 1)
    ends = number * (model.d_inner * model.d_state + (model.heads if two else model.d_inner))
    group = Group("the slices of a strand", sharing.context)
    gather = Exchange("all-gather", "edges", group, edges, passes * (layers + whole + inputs))
    return [
        gather,
        replace(gather, what="states", bytes=ends, times=passes * (layers + whole)),
        replace(gather, what="states", bytes=number * model.d_inner * model.d_state, times=passes * layers),
        replace(gather, kind="reduce-scatter", bytes=edges * sharing.context, times=passes * layers),
    ]


def _element(config: Config) -> int:
    return {"fp64": 8, "fp32": 4, "bf16": 2}[config.train.precision]


def micro_batches_per_step(config: Config, world: int) -> int:
    """Number of micro-batches of a rank in a step."""
    sharing = check_layout(config, world)
    return config.train.global_batch * sharing.ranks // (config.train.micro_batch * world)
