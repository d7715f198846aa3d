"""Environment settings of a rank for the libraries that it uses, made before it joins the others. A user's settings
stay.
"""

import fcntl
import ipaddress
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from caduceus.patience import is_file

FLIGHT_RECORDS = "2000"
"""Number of collectives in NCCL's record, which is written to the run's logs when one hangs."""
FLIGHT_FILES = "nccl-rank"
"""Prefix of the records' file names in the run's logs, followed by the rank, as torch's tools expect."""
_GLOO_GROUPS = 3
"""Groups over gloo that a process has: one for training, one for slow work, and one of the ranks that write."""
_OTHER_DESCRIPTORS = 512
"""Further file descriptors that a process needs: files, shards, pipes of loader workers, libraries."""
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_SIOCGIFADDR = 0x8915
_ELSEWHERE = "192.0.2.1"
"""An address that is reserved for documentation: the route to it is the default route."""


def allow_descriptors(world: int) -> None:
    """Raise this process's limit of open files to what it needs; where that is forbidden, let gloo connect lazily.

    A gloo group over all ranks needs a connection to each of them, and the usual limit is 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = descriptors(world)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def descriptors(world: int) -> int:
    """Open files that a rank of `world` may need."""
    return _GLOO_GROUPS * (world + 3) + _OTHER_DESCRIPTORS


def choose_interface(world: int) -> None:
    """Let gloo use the network interface that leads to MASTER_ADDR, in a run over several nodes.

    By default it uses the address of the host's name, which on many systems is a loopback address.
    """
    if world > int(os.environ.get("LOCAL_WORLD_SIZE", world)) and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_to(os.environ["MASTER_ADDR"]) or interface_to(_ELSEWHERE)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def interface_to(host: str) -> str | None:
    """The network interface from which packets to a host go; None where there is none but the loopback."""
    own = own_address_towards(host)
    if own is None or ipaddress.ip_address(own).is_loopback:
        return None
    return next((name for name, address in addresses() if address == own), None)


def own_address_towards(host: str) -> str | None:
    """The address of this machine on the route to a host; no packet is sent."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return probe.getsockname()[0].partition("%")[0]
    except OSError:
        return None


def addresses() -> Iterator[tuple[str, str]]:
    """Yield (interface, address) of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            yield name, socket.inet_ntoa(answer[20:24])
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if is_file(table) else ():
        digits, *_, name = line.split()
        yield name, str(ipaddress.IPv6Address(int(digits, 16)))


def stay_near(pci_address: str) -> None:
    """Pin this process, and what it starts, to the processors near its GPU, as the others are connected less directly.

    It does nothing where too few of the processors that the process was given are near.
    """
    table = _PCI_DEVICES / pci_address / "local_cpulist"
    if not is_file(table):
        return
    given, near = os.sched_getaffinity(0), cpus(table.read_text())
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if given - near and len(given & near) >= max(share, 1):
        os.sched_setaffinity(0, given & near)


def cpus(text: str) -> set[int]:
    """The numbers in a list of Linux's form, such as 0-3,8."""
    spans = [span.partition("-") for span in text.strip().split(",") if span]
    return {number for first, _, last in spans for number in range(int(first), int(last or first) + 1)}


def set_nccl_defaults(logs: Path) -> None:
    """Let NCCL record the last collectives, and write the record to `logs` where one hangs.

    NCCL's and torch's own defaults decide what happens when a peer is lost.
    """
    trace = str(logs / FLIGHT_FILES)
    defaults = {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": FLIGHT_RECORDS,
        "TORCH_FR_DUMP_TEMP_FILE": trace,
        "TORCH_NCCL_TRACE_BUFFER_SIZE": FLIGHT_RECORDS,  # the old names of two of these, until torch 2.8
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": trace,
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
