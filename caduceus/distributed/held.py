"""The strategy that `auto` takes, and what a rank holds of the model under each strategy. Imports no torch."""

from dataclasses import dataclass

from caduceus.config import Config, ParallelConfig
from caduceus.model.costs import kept_numbers, parameter_count

LARGEST_REPLICATED_MODEL = 300_000_000
"""Up to this number of parameters every rank keeps a whole model: 16 bytes each for weight, gradient and AdamW's two
moments.

For larger ones, updating a whole model would take a few per cent of a step on many nodes, by `launch/step_model.py`.
"""
_FP32 = 4


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds, without temporary buckets of gradients and gathered parameters."""

    parameters: int
    gradients: int
    states: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.states


def chosen_strategy(parallel: ParallelConfig, parameters: int, world: int, node: int) -> tuple[str, int, str]:
    """(strategy, `parallel.shard`, reason) that `parallel.strategy: auto` takes for a model with `parameters`
    parameters.

    `node`: the number of ranks on each node.
    """
    if world == 1:
        return "single", parallel.shard, "one process"
    if parameters <= LARGEST_REPLICATED_MODEL:
        return (
            "ddp",
            parallel.shard,
            f"{world} ranks; {parameters:,} parameters fit on each, and sharding them would only add latency",
        )
    if not parallel.shard and 1 < node < world and world % node == 0:
        why = f"{world} ranks; {parameters:,} parameters, shared by the {node} ranks of a node, whose links are fast"
        return "fsdp", node, why
    shared = parallel.shard or world
    return "fsdp", parallel.shard, f"{world} ranks; {parameters:,} parameters, shared by {shared} ranks"


def strategy_of(config: Config, world: int, node: int = 0) -> tuple[str, int]:
    """(strategy, ranks that share a copy of the parameters); `auto` decided for `node` ranks to a node (0: all)."""
    strategy, shard = config.parallel.strategy, config.parallel.shard
    if strategy == "auto":
        parameters = parameter_count(config.model)
        strategy, shard, _ = chosen_strategy(config.parallel, parameters, world, node or world)
    return strategy, {"fsdp": shard or world, "deepspeed": world}.get(strategy, 1)


def held(config: Config, world: int, node: int = 0) -> Held:
    """The memory that a rank holds of the model between the backward pass and the update."""
    whole = _FP32 * parameter_count(config.model)
    states = _FP32 * kept_numbers(config.model, config.train)
    strategy, holders = strategy_of(config, world, node)
    if strategy != "deepspeed":
        return Held(whole // holders, whole // holders, states // holders)
    stage = config.parallel.zero_stage
    if stage == 0:
        return Held(whole, whole, states)
    master = (whole + states) // world  # it keeps its own copy, even of fp32 parameters
    return Held(whole // world if stage == 3 else whole, whole if stage == 1 else whole // world, master)
