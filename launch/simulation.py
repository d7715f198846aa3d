"""`launch/slurm.py --dry-run --simulate`: what each rank of a run would do, and the time of steps on one and on many
nodes.

The ranks are really built, in torch's fake process group; times are computed by a model, and none is measured.
"""

import copy
from collections.abc import Iterable, Sequence

from caduceus.config import Config
from caduceus.distributed.costs import exchanges
from caduceus.distributed.layout import Room, Sharing, check_layout
from caduceus.distributed.network import Network
from caduceus.errors import UserError
from caduceus.files import show_bytes
from caduceus.train.estimate import GPU_BYTES, seconds_per_base
from launch.request import JobRequest
from launch.step_model import LAUNCH_SECONDS, MEMORY_RATE, Step, asked, layouts

CLOSE = 0.02
"""Share of a step by which another layout must be faster to be reported: the model is not more exact than that."""
_BAR = 40


def print_simulation(config: Config, request: JobRequest) -> None:
    """Print the whole simulation for the nodes of a request."""
    if not request.gpus_per_node:
        raise UserError(
            "--simulate: computes times of GPUs only; give --gpus-per-node, or a preset such as --cluster h100x8"
        )
    network = Network(node=request.processes_per_node)
    print(f"# {request.world} ranks on {request.nodes} nodes\n")
    print("\n".join(_arrangement(config, request.world, network)))
    for title, grows in (("This global batch", False), ("A global batch that grows with the nodes", True)):
        steps = series(config, request.nodes, network, grows)
        print(f"\n## {title}\n")
        print("\n".join(table_of_steps(steps, network)))
        print()
        print("\n".join(bars(steps)))
    print(f"\nUnmeasured, by a model: {assumptions(network)}.")


def assumptions(network: Network) -> str:
    """The assumptions behind the times."""
    return (
        f"an H100 takes {seconds_per_base(256, 16) * 1e6:.2f} us for a base of 256 channels and 16 layers, forward and "
        "backward (a model's, by benchmarks/sass.py), which scales with both; a kernel takes its "
        f"processor {LAUNCH_SECONDS * 1e6:.0f} us to launch; memory of the GPU {MEMORY_RATE / 1e12:.2f} TB/s (data "
        f"sheet); {network.describe()}; transfers of gradients and sharded parameters overlap with computation, all "
        "others are waited for"
    )


def series(config: Config, most: int, network: Network, grows: bool) -> list[tuple[int, Step | str]]:
    """(nodes, the step or why there is none) for 1, 2, 4, … and `most` nodes; `grows`: the global batch grows with the
    nodes.
    """
    counts = sorted({*(2**power for power in range(most.bit_length())), most})
    found: list[tuple[int, Step | str]] = []
    for nodes in counts:
        scaled = copy.copy(config)
        scaled.train = copy.copy(config.train)
        if grows:
            scaled.train.global_batch *= nodes
            scaled.train.batch_ramp = None
        try:
            found.append((nodes, asked(scaled, nodes * network.node, network)))
        except UserError as error:
            found.append((nodes, str(error)))
    return found


def fastest(step: Step, network: Network) -> Step | None:
    """The fastest layout that fits a GPU, if it is faster than `step` by more than `CLOSE` or `step` does not fit; else
    None.
    """
    others = [other for other in layouts(step.config, step.estimate.world, network) if other.fits]
    best = min(others, key=lambda other: other.seconds, default=None)
    return best if best and (not step.fits or best.seconds < (1 - CLOSE) * step.seconds) else None


def table_of_steps(steps: Sequence[tuple[int, Step | str]], network: Network) -> list[str]:
    """Lines of a Markdown table of the steps."""
    heads = ("nodes", "layout", "bases a rank", "micro-batches", "GB", "ms a step", "efficiency", "bound by", "faster")
    rows: list[Iterable[str]] = []
    for (nodes, step), efficiency in zip(steps, efficiencies(steps), strict=True):
        if isinstance(step, str):
            rows.append((str(nodes), f"none: {step.partition(';')[0]}", *[""] * 7))
            continue
        found, best = step.estimate, fastest(step, network)
        parts = found.sequences // step.config.train.micro_batch
        share = step.parts[step.bound] / step.seconds
        rows.append(
            (
                str(nodes),
                step.layout + ("" if step.fits else " (does not fit)"),
                f"{found.bases:,}",
                str(parts),
                f"{found.memory_bytes / 1e9:.1f}",
                f"{1e3 * step.seconds:,.1f}",
                f"{efficiency:.2f}",
                f"{step.bound} ({share:.0%})",
                f"{best.layout}: {1e3 * best.seconds:,.1f}" if best else "none",
            )
        )
    return markdown(heads, rows)


def efficiencies(steps: Sequence[tuple[int, Step | str]]) -> list[float]:
    """Bases per second of a rank, relative to those on the fewest nodes that can run it; 0 where there is no step."""
    rates = [0.0 if isinstance(step, str) else step.bases_per_rank for _, step in steps]
    first = next((rate for rate in rates if rate), 1.0)
    return [rate / first for rate in rates]


def bars(steps: Sequence[tuple[int, Step | str]]) -> list[str]:
    """The efficiencies as lines of text."""
    lines = ["bases per second of a rank, relative to the first line"]
    for (nodes, _), efficiency in zip(steps, efficiencies(steps), strict=True):
        length = round(_BAR * min(efficiency, 1.0))
        lines.append(f"{nodes:>4} nodes |{'█' * length:<{_BAR}}| {efficiency:.2f}")
    return lines


def markdown(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _arrangement(config: Config, world: int, network: Network) -> list[str]:
    """Lines about which rank draws, computes, holds and exchanges what."""
    from launch.simulated_ranks import refuse_gaps, simulated_ranks  # which imports torch

    sharing = check_layout(config, world, Room(GPU_BYTES, network.node))
    step = asked(config, world, network)
    ranks = simulated_ranks(step.config, world, sharing, network.node)
    refuse_gaps(ranks, sharing, config.data.seq_len)
    lines = [f"{step.layout}: {_shares(config, world, sharing)}", ""]
    names = dict.fromkeys(name for rank in ranks for name in rank.groups)
    rows = []
    for name in names:
        groups = {rank.groups[name] for rank in ranks if name in rank.groups}
        nodes = max(len({member // network.node for member in members}) for members in groups)
        first = ", ".join(map(str, sorted(min(groups))[:4]))
        rows.append((name, f"{len(groups):,}", f"{len(min(groups)):,}", str(nodes), f"{first}, …"))
    lines += [*markdown(("group", "groups", "ranks each", "nodes each", "the first"), rows), ""]
    lines += [*_memory(step, [rank.parameters for rank in ranks]), ""]
    return lines + _collectives(step, network)


def _shares(config: Config, world: int, sharing: Sharing) -> str:
    """Which samples and positions the ranks draw and compute; `refuse_gaps` has already checked that nothing is
    missing.
    """
    batch, data_world = config.train.global_batch, world // sharing.ranks
    words = f"data-parallel rank r of {data_world:,} draws samples r, r + {data_world:,}, … of every {batch:,}"
    if sharing.context > 1:
        words += (
            f"; each rank has {config.data.seq_len // sharing.context:,} of a sample's {config.data.seq_len:,} bases"
        )
    if sharing.strands > 1:
        words += ", and one of its strands"
    return f"{words}. Together they draw every sample once, in the order of one process"


def _memory(step: Step, parameters: list[int]) -> list[str]:
    held = f"{min(parameters):,}" if min(parameters) == max(parameters) else f"{min(parameters):,}-{max(parameters):,}"
    rows = [(name, show_bytes(count)) for name, count in step.estimate.footprint.memory.items()]
    rows.append(("all", show_bytes(step.estimate.memory_bytes)))
    return [
        f"A rank holds {held} of {step.estimate.parameters:,} parameters, and takes memory:",
        "",
        *markdown(("what", "bytes"), rows),
    ]


def _collectives(step: Step, network: Network) -> list[str]:
    """A table of the collectives of a step."""
    world, recomputed = step.estimate.world, step.estimate.footprint.recomputed
    rows = []
    for exchange in exchanges(step.config, world, network.node, recomputed):
        seconds = network.seconds(exchange)
        rows.append(
            (
                exchange.kind,
                exchange.what,
                f"{exchange.group.name} ({exchange.group.size:,} on {network.nodes(exchange.group):,} nodes)",
                show_bytes(exchange.bytes),
                f"{exchange.times:,}",
                f"{1e6 * seconds:,.0f}",
                f"{1e3 * exchange.times * seconds:,.2f}",
                exchange.behind or "nothing: waited for",
            )
        )
    return markdown(("collective", "of", "between", "each gives", "times", "us each", "ms a step", "behind"), rows)
