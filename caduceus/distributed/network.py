"""A small model of the time that collectives take on a network. Nothing here is measured. Imports no torch.

A collective takes a number of steps, each with a latency, and sends bytes through the narrowest link. It uses the
fastest of rings and (for reductions) trees, each with NCCL's protocol for few bytes (LL, at a quarter of the bandwidth)
or for many (Simple). Latencies and shares of the bandwidth are those with which NCCL itself chooses (NVIDIA/nccl,
src/graph/tuning.cc, release 2.10); rates of links are from data sheets.
"""

import math
from dataclasses import dataclass

from caduceus.distributed.costs import Exchange, Group


@dataclass(frozen=True)
class Protocol:
    """A protocol of an algorithm: latencies in seconds, and the share of the links' bandwidth that it reaches."""

    start: float
    step: float
    """Latency from one rank to the next within a node."""
    hop: float
    """Latency from one node to the next."""
    share: float


_RINGS = (Protocol(3.6e-6, 0.47e-6, 2.7e-6, 1 / 4), Protocol(8.4e-6, 3.4e-6, 9.6e-6, 1.0))
_TREES = (Protocol(4.4e-6, 0.52e-6, 5.0e-6, 0.9 / 3.8), Protocol(0.0, 28e-6, 50e-6, 0.9))
_LL_BETWEEN_NODES = 1.8
"""Factor of the latency within a node, for the protocol for few bytes, where ranks are on several nodes."""


@dataclass(frozen=True)
class Network:
    """The links of a rank, in bytes per second in each direction."""

    node: int = 8
    """Ranks of a node."""
    link: float = 450e9
    """The link to other ranks of its node: NVLink of an H100 SXM."""
    adapter: float = 50e9
    """The link to other nodes: its own InfiniBand NDR adapter, 400 Gb/s."""
    carried: float = 0.8
    """Share of a link's rate that is usable."""

    def seconds(self, exchange: Exchange) -> float:
        """Seconds of one exchange, while ranks of other groups do the same, each over its own links."""
        size, nodes = exchange.group.size, self.nodes(exchange.group)
        if size == 1:
            return 0.0
        local = size / nodes
        bandwidth = self.carried * (self.link if nodes == 1 else min(self.link, local * self.adapter))
        both_ways = 2 if exchange.kind == "all-reduce" else 1
        volume = exchange.bytes * {"all-gather": size - 1, "broadcast": 1}.get(exchange.kind, (size - 1) / size)
        steps, hops = both_ways * (size - 1), both_ways * (nodes - 1)
        times = []
        for ring, is_small in zip(_RINGS, (True, False), strict=True):
            step = ring.step * (_LL_BETWEEN_NODES if is_small and nodes > 1 else 1)
            latency = ring.start + (steps - hops) * step + hops * ring.hop
            times.append(latency + both_ways * volume / (bandwidth * ring.share))
        for tree in _TREES if exchange.kind == "all-reduce" else ():
            latency = tree.start + 2 * ((local - 1) * tree.step + math.log2(nodes) * tree.hop)
            times.append(latency + 2 * exchange.bytes / (bandwidth * tree.share))
        return min(times)

    def nodes(self, group: Group) -> int:
        """The number of nodes with ranks of a group."""
        if group.stride >= self.node:
            return group.size
        return math.ceil(group.size * group.stride / self.node)

    def describe(self) -> str:
        """The assumptions, in one line."""
        return (
            f"{self.node} ranks to a node; NVLink {self.link / 1e9:.0f} GB/s and InfiniBand {self.adapter / 1e9:.0f} "
            f"GB/s a rank and direction (data sheets), of which {self.carried:.0%} arrives; latencies as NCCL 2.10 has "
            "them to choose its algorithms"
        )
