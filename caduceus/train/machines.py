"""The load of all nodes and GPUs of a run, in a row that the main rank writes.

Only the main rank writes rows and feeds W&B, so the other nodes send their numbers to it. W&B's own way, a client on
each node in its mode `shared`, would need access to the server from all nodes, and does not work offline.
"""

import math
import os
import socket
import time
from pathlib import Path

import torch

from caduceus.config import Config
from caduceus.devices import is_gpu
from caduceus.distributed.ranks import Ranks
from caduceus.run.machine import OF_GPUS, OF_NODES, Machine
from caduceus.run.node import node_folder


class Machines:
    """The machines of a run. All ranks construct it together, and call `row` together when `are_due` is true on the
    main rank.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._ranks, self._seconds = ranks, config.monitor.machine_seconds
        self._told = time.monotonic()
        if not self._seconds:
            return
        local = int(os.environ.get("LOCAL_RANK", 0))
        self._machine = Machine(Path(config.data.cache_dir or node_folder(os.environ))) if local == 0 else None
        seats = ranks.gather_objects((socket.gethostname().partition(".")[0], local))
        self._nodes = _nodes(seats)
        self._gpus = [f"{node}-gpu{local}" for node, (_, local) in zip(self._nodes, seats, strict=True)]

    @property
    def are_due(self) -> bool:
        """Whether it is time for a row; only the main rank is asked."""
        return self._ranks.is_main and 0 < self._seconds <= time.monotonic() - self._told

    def row(self, step: int) -> dict[str, float]:
        """The row after a step: NAME/NODE for each node, NAME/NODE-gpuN for each GPU; unknown numbers are left out."""
        self._told = time.monotonic()
        of_node = [math.nan] * len(OF_NODES) if self._machine is None else self._machine.read()
        table = self._ranks.gather([*of_node, *_gpu(self._ranks.device)]).tolist()
        row: dict[str, float] = {"step": step}
        for node, gpu, numbers in zip(self._nodes, self._gpus, table, strict=True):
            named = [(name, node) for name in OF_NODES] + [(name, gpu) for name in OF_GPUS]
            told = zip(named, numbers, strict=True)
            row |= {f"{name}/{of}": round(value, 3) for (name, of), value in told if math.isfinite(value)}
        return row


def _nodes(seats: list[tuple[str, int]]) -> list[str]:
    """The name of each rank's node: the host's name, and a number where several nodes have the same name.

    seats: (host, local rank) of each rank; the ranks of a node are consecutive, and begin with local rank 0.
    """
    numbers = [sum(local == 0 for _, local in seats[: place + 1]) - 1 for place in range(len(seats))]
    hosts = {number: host for number, (host, _) in reversed(list(zip(numbers, seats, strict=True)))}
    names = list(hosts.values())
    return [hosts[n] if names.count(hosts[n]) == 1 else f"{hosts[n]}-{n}" for n in numbers]


def _gpu(device: torch.device) -> list[float]:
    """The `OF_GPUS` numbers of this rank's GPU, NaN where they are unknown."""
    found = [math.nan] * len(OF_GPUS)
    if not is_gpu(device):
        return found
    readings = (
        lambda: torch.cuda.utilization(device),
        lambda: _used_percent(*torch.cuda.mem_get_info(device)),
        lambda: torch.cuda.power_draw(device) / 1000,
        lambda: torch.cuda.temperature(device),
    )
    for place, read in enumerate(readings):
        try:
            found[place] = float(read())
        except Exception:  # the maker's library may be absent or forbidden, or may not know this number for this card
            continue
    return found


def _used_percent(free: int, total: int) -> float:
    return 100 * (1 - free / total)
