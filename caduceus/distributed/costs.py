"""What a layout of ranks costs each of them: bytes held between passes, and bytes given to collectives in a step.

Counted from the configuration, for parameters and gradients in fp32. Imports no torch.
"""

from dataclasses import dataclass

from caduceus.config import Config
from caduceus.distributed.layout import LARGEST_REPLICATED_MODEL, check_layout
from caduceus.model.costs import MOMENTS, block_parameters, parameter_count, streams

_FP32 = 4


@dataclass(frozen=True)
class Held:
    """Bytes of a rank, without the buckets in which gradients and gathered parameters pass by."""

    parameters: int
    gradients: int
    states: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.states


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank gives to each kind of collective in a step, without the few numbers on which ranks agree."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    @property
    def total(self) -> int:
        return self.all_reduce + self.all_gather + self.reduce_scatter

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(
            self.all_reduce + other.all_reduce,
            self.all_gather + other.all_gather,
            self.reduce_scatter + other.reduce_scatter,
        )


def strategy_of(config: Config, world: int) -> tuple[str, int]:
    """(strategy, ranks that share a copy of the parameters), with `auto` as a run on one node decides it."""
    parallel = config.parallel
    strategy = parallel.strategy
    if strategy == "auto":
        replicated = parameter_count(config.model) <= LARGEST_REPLICATED_MODEL
        strategy = "single" if world == 1 else "ddp" if replicated else "fsdp"
    return strategy, {"fsdp": parallel.shard or world, "deepspeed": world}.get(strategy, 1)


def held(config: Config, world: int) -> Held:
    """What a rank holds between the backward pass and the update."""
    whole = _FP32 * parameter_count(config.model)
    strategy, holders = strategy_of(config, world)
    if strategy != "deepspeed":
        kept = MOMENTS + bool(config.train.ema)
        return Held(whole // holders, whole // holders, kept * whole // holders)
    stage = config.parallel.zero_stage
    if stage == 0:
        return Held(whole, whole, MOMENTS * whole)
    master = (1 + MOMENTS) * whole // world  # it keeps a copy of its own, also of parameters in fp32
    return Held(whole // world if stage == 3 else whole, whole if stage == 1 else whole // world, master)


def sent(config: Config, world: int) -> Sent:
    """What a rank gives to collectives in a step that recomputes nothing.

    Of ZeRO 3 it is an upper bound: small parameters stay gathered, and the last block between its two passes.
    """
    return _for_parameters(config, world) + _for_sequences(config, world)


def _for_parameters(config: Config, world: int) -> Sent:
    strategy, holders = strategy_of(config, world)
    whole = _FP32 * parameter_count(config.model)
    rest = whole - _FP32 * config.model.n_layer * block_parameters(config.model)
    passes = micro_batches(config, world)
    if world == 1:
        return Sent()
    if strategy == "fsdp":
        # Blocks are gathered for either pass, what is left once; gradients meet in the last micro-batch.
        copies = whole // holders if holders < world else 0
        return Sent(copies, passes * (2 * whole - rest) // holders, whole)
    if strategy == "deepspeed" and config.parallel.zero_stage:
        stage = config.parallel.zero_stage
        if stage == 3:
            return Sent(0, passes * (2 * whole - rest) // world, passes * whole)
        return Sent(whole * (passes if stage == 2 else 1), whole // world, 0)
    return Sent(all_reduce=whole)


def _for_sequences(config: Config, world: int) -> Sent:
    """What the ranks of a sample exchange of it."""
    model, sharing = config.model, check_layout(config, world)
    passes, sequences = micro_batches(config, world), config.train.micro_batch
    element = {"fp64": 8, "fp32": 4, "bf16": 2}[config.train.precision]
    logits = edges = states = 0
    if sharing.strands > 1:
        labels = round(config.data.mask_prob * sequences * config.data.seq_len / sharing.context)
        logits = max(element, _FP32) * labels * model.padded_vocab_size
    if sharing.context > 1:
        rows = model.n_layer * streams(model) // sharing.strands * sequences
        two = model.mixer == "mamba2"  # convolves B and C as well, and has one step size for a head
        channels = model.d_inner + (2 * model.d_state if two else 0)
        edges = element * rows * channels * 2 * (model.d_conv - 1)
        state = 2 * model.d_inner * model.d_state + (model.heads if two else model.d_inner)
        states = max(element, _FP32) * rows * (2 if model.bidirectional else 1) * state
    return Sent(passes * logits, passes * (edges + states), passes * edges * sharing.context)


def micro_batches(config: Config, world: int) -> int:
    """Micro-batches of a rank in a step."""
    sharing = check_layout(config, world)
    return config.train.global_batch * sharing.ranks // (config.train.micro_batch * world)
