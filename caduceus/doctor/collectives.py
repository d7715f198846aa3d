"""How fast ranks exchange data, in a node and between nodes, compared with what their cards and adapters
should give.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from caduceus.devices import is_gpu
from caduceus.distributed import groups
from caduceus.distributed.ranks import PATIENCE, Ranks
from caduceus.doctor.findings import Finding, ok_unless

GPU_BYTES, CPU_BYTES = 256 * 2**20, 4 * 2**20
_TRIALS = 5
_LEAST = 0.5
"""Share of the expected rate below which something is wrong."""
_LINKS = {"H100": 450e9, "H200": 450e9, "A100": 300e9, "B200": 900e9}
"""Bytes per second in one direction from a card to the others of its node by NVLink, from data sheets (SXM)."""
_PORTS = Path("/sys/class/infiniband")


def rates(ranks: Ranks, nodes: list[str]) -> Iterator[Finding]:
    """Measured rates of all-reduce and all-gather in each group. All ranks call it; `nodes` has the node of
    each rank.
    """
    here = nodes[ranks.rank]
    inside = [rank for rank, node in enumerate(nodes) if node == here]
    place = inside.index(ranks.rank)
    across = [rank for rank, node in enumerate(nodes) if nodes[:rank].count(node) == place]
    # All ranks must make the same number of groups: otherwise nodes with fewer ranks would leave others waiting.
    if len({nodes.count(node) for node in nodes}) == 1:
        for name, members, most in (
            ("in a node", inside, _in_a_node()),
            ("between nodes", across, _between(len(inside))),
        ):
            if 1 < len(members) < ranks.world or (len(members) == ranks.world and name == "in a node"):
                yield _rate(name, members, ranks, most)
    if len(set(nodes)) > 1:
        yield _rate("all ranks", list(range(ranks.world)), ranks, None)


def _rate(name: str, members: list[int], ranks: Ranks, most: float | None) -> Finding:
    group = groups.group_of(members, PATIENCE, groups.on_device(ranks.device))
    size, count = len(members), (GPU_BYTES if is_gpu(ranks.device) else CPU_BYTES) // 4
    part = torch.ones(count // size, device=ranks.device)
    whole = torch.ones(count, device=ranks.device)
    nbytes = 4 * count * (size - 1) / size
    reduced = 2 * nbytes / _seconds(lambda: dist.all_reduce(whole, group=group), ranks.device)
    gathered = nbytes / _seconds(lambda: groups.gather(part, group), ranks.device)
    slowest = ranks.gather([reduced, gathered]).min(0).values.tolist()
    told = "all-reduce {:.1f} GB/s, all-gather {:.1f} GB/s per rank, on the slowest".format(
        *(rate / 1e9 for rate in slowest)
    )
    told = f"{name}, {size} ranks: {told}" + (f"; its links give {most / 1e9:.0f}" if most else "")
    remedy = "see nvidia-smi topo -m, ibstat and NCCL_DEBUG=INFO: a link is down, or NCCL goes another way"
    return ok_unless(bool(most) and slowest[0] < _LEAST * most, "exchange", told, remedy)


def _seconds(exchange: Callable[[], Tensor | dist.Work | None], device: torch.device) -> float:
    """Seconds of the fastest of several exchanges, after a first one that makes the connections."""
    best = float("inf")
    for trial in range(1 + _TRIALS):
        started = time.perf_counter()
        exchange()
        if is_gpu(device):
            torch.cuda.synchronize(device)
        if trial:
            best = min(best, time.perf_counter() - started)
    return best


def _in_a_node() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in _LINKS.items() if part in name and "PCIe" not in name), None)


def _between(local_ranks: int) -> float | None:
    """A rank's share of what the machine's InfiniBand adapters give, in bytes per second."""
    if not torch.cuda.is_available():
        return None
    bits = [float(path.read_text().split()[0]) for path in _PORTS.glob("*/ports/*/rate")]
    return sum(bits) * 1e9 / 8 / local_ranks if bits else None
