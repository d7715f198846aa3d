"""The load of this process's node, whatever causes it: processors, memory, disk, network. Imports no torch."""

import contextlib
import math
import time
from pathlib import Path

import psutil

from caduceus.patience import exists

_INTERFACES, _ADAPTERS = Path("/sys/class/net"), Path("/sys/class/infiniband")
_WORD = 4
"""Bytes per unit of an InfiniBand adapter's counters."""
OF_NODES = (
    "cpu_percent",
    "memory_percent",
    "disk_percent",
    "disk_read_bytes_per_second",
    "disk_write_bytes_per_second",
    "network_received_bytes_per_second",
    "network_sent_bytes_per_second",
)
OF_GPUS = ("gpu_percent", "gpu_memory_percent", "gpu_watts", "gpu_celsius")
"""The numbers of a row for each node, and for each GPU."""


class Machine:
    """Reads the machine's load; rates are averages since the last reading. `disk`: a folder on the disk whose space is
    read.
    """

    def __init__(self, disk: Path) -> None:
        self._disk = next(folder for folder in (disk, *disk.absolute().parents) if exists(folder))
        psutil.cpu_percent()  # the first call has nothing to compare with
        self._time, self._bytes = time.monotonic(), _counters()

    def read(self) -> list[float]:
        """A number for each of `OF_NODES`; NaN where the system does not tell."""
        shares = [math.nan] * 3
        with contextlib.suppress(OSError, psutil.Error):
            shares = [
                psutil.cpu_percent(),
                psutil.virtual_memory().percent,
                psutil.disk_usage(str(self._disk)).percent,
            ]
        now, counters = time.monotonic(), _counters()
        seconds = now - self._time
        rates = [(after - before) / seconds for before, after in zip(self._bytes, counters, strict=True)]
        self._time, self._bytes = now, counters
        return [*shares, *rates]


def _counters() -> list[float]:
    """Bytes that disks read and wrote, and that the network received and sent, since the machine started."""
    disk, network = [math.nan] * 2, [math.nan] * 2
    with contextlib.suppress(OSError, RuntimeError, psutil.Error):
        if (disks := psutil.disk_io_counters()) is not None:
            disk = [disks.read_bytes, disks.write_bytes]
    with contextlib.suppress(OSError, psutil.Error):
        found = psutil.net_io_counters(pernic=True)
        # Bridges, bonds and the like count the bytes of their cards a second time.
        cards = [name for name in found if exists(_INTERFACES / name / "device")]
        told = [found[name] for name in cards or found.keys() - {"lo"}]
        remote = _adapters()
        network = [sum(one.bytes_recv for one in told) + remote[0], sum(one.bytes_sent for one in told) + remote[1]]
    return [*disk, *network]


def _adapters() -> list[int]:
    """Bytes that adapters for remote memory access (RDMA) received and sent, which the network counters leave out."""
    totals = [0, 0]
    for place, name in enumerate(("port_rcv_data", "port_xmit_data")):
        for counter in _ADAPTERS.glob(f"*/ports/*/counters/{name}"):
            with contextlib.suppress(OSError, ValueError):
                totals[place] += _WORD * int(counter.read_text())
    return totals
