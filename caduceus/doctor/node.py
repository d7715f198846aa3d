"""What one machine offers for training, examined by one of its ranks."""

import os
import resource
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from caduceus.distributed.environment import addresses, descriptors, interface_to, own_address_towards
from caduceus.doctor.findings import Finding, State, ok_unless
from caduceus.files import show_bytes

LEAST_SHARED_MEMORY = 2**30
SLOW_FILE = 0.1
"""Longest time, in seconds, that may pass until a small file is on the disk under its name."""
_TRIALS, _LARGE = 5, 32 * 2**20
_SHARED_MEMORY, _INFINIBAND = Path("/dev/shm"), Path("/sys/class/infiniband")
_DRIVER = Path("/proc/driver/nvidia/version")


def findings(world: int, folder: Path) -> Iterator[Finding]:
    """The findings on this machine for a run of `world` ranks whose directory would be made in `folder`."""
    yield gpus()
    yield open_files(world)
    yield locked_memory()
    yield shared_memory()
    yield network()
    yield processors()
    yield files(folder)
    yield temporary_files()
    yield compiler()


def gpus() -> Finding:
    """How many GPUs there are, of which kind and with which software, and whether others use them."""
    if not torch.cuda.is_available():
        driver = _DRIVER.is_file()
        told = "the machine has NVIDIA's driver, but torch sees no GPU" if driver else "none: ranks compute on the CPU"
        return ok_unless(
            driver,
            "GPUs",
            told,
            f"torch {torch.__version__} wants CUDA {torch.version.cuda}: see nvidia-smi",
            State.WRONG,
        )
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = [torch.cuda.mem_get_info(number) for number in range(len(names))]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    driver = _DRIVER.read_text().splitlines()[0].split("Module")[-1].split()[0] if _DRIVER.is_file() else "unknown"
    told = f"{len(names)} x {', '.join(sorted(set(names)))}; driver {driver}, CUDA {torch.version.cuda}, NCCL {nccl}"
    used = [number for number, (free, total) in enumerate(memory) if free < 0.9 * total]
    taken = f"; in use already: {', '.join(map(str, used))}" if used else ""
    return ok_unless(bool(used), "GPUs", told + taken, "end what runs there: nvidia-smi names the processes")


def open_files(world: int) -> Finding:
    """Whether a rank may have as many connections as it needs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, most = descriptors(world), "any number" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    few = hard != resource.RLIM_INFINITY and hard < needed
    told = f"a process may have {most}; a rank of {world} needs up to {needed:,}"
    return ok_unless(few, "open files", told, "raise nofile in /etc/security/limits.conf or in slurmd's unit")


def locked_memory() -> Finding:
    """Whether memory may be locked without limit, as InfiniBand, which registers it, needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(path.name for path in _INFINIBAND.glob("*")) if _INFINIBAND.is_dir() else []
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"at most {show_bytes(soft)}"
    told = f"{limit}; InfiniBand: {', '.join(adapters) or 'none'}"
    limited = bool(adapters) and soft != resource.RLIM_INFINITY
    return ok_unless(limited, "locked memory", told, "set memlock to unlimited for jobs (PropagateResourceLimits)")


def shared_memory() -> Finding:
    """The space in shared memory, through which loader workers hand over batches."""
    if not _SHARED_MEMORY.is_dir():
        return Finding("shared memory", State.LOOK, f"there is no {_SHARED_MEMORY}", "set data.workers=0")
    free = shutil.disk_usage(_SHARED_MEMORY).free
    remedy = "enlarge it (docker: --shm-size), or lower data.workers"
    return ok_unless(free < LEAST_SHARED_MEMORY, "shared memory", f"{show_bytes(free)} free", remedy)


def network() -> Finding:
    """The interface by which this machine is reached, and whether its own name resolves to it."""
    own = own_address_towards(socket.gethostname())
    first = os.environ.get("MASTER_ADDR")
    way = interface_to(first) if first else None
    known = ", ".join(f"{name} {address}" for name, address in addresses() if name != "lo")
    alone = own is None or own.startswith("127.")
    told = f"{known or 'no interface but the loopback'}; this machine's name leads to {own or 'nothing'}"
    told += f"; to {first} by {way}" if way else ""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    lost = alone and not (way or chosen) and int(os.environ.get("SLURM_NNODES", 1)) > 1
    remedy = "correct /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in the preset's env"
    return ok_unless(lost, "network", told, remedy)


def processors() -> Finding:
    """The processors that this process may use, compared with the threads that it was told to start."""
    given = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    told = f"{given} of {os.cpu_count()} for this rank, which starts {threads} threads"
    return ok_unless(threads > given, "processors", told, "set OMP_NUM_THREADS to the processors of a rank")


def files(folder: Path) -> Finding:
    """How long a small file takes to be safe where runs are kept, and how fast a large one is written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as directory:
            seconds = [_write(Path(directory) / "small", 4096) for _ in range(_TRIALS)]
            rate = _LARGE / _write(Path(directory) / "large", _LARGE)
    except OSError as error:
        return Finding("files", State.WRONG, f"{folder}: {error.strerror}", "choose another --folder, or mend the disk")
    latency = statistics.median(seconds)
    told = f"{folder.absolute()}: a small file in {1000 * latency:.1f} ms, a large one at {show_bytes(int(rate))}/s"
    remedy = "checkpoints and metrics will wait: choose another file system for run.dir"
    return ok_unless(latency > SLOW_FILE, "files", told, remedy)


def temporary_files() -> Finding:
    """Space on the machine's own disk, where compiled kernels are kept."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    return ok_unless(free < 2**30, "temporary files", f"{folder}: {show_bytes(free)} free", "make room, or set TMPDIR")


def compiler() -> Finding:
    """The C compiler, which Triton needs on GPUs."""
    found = shutil.which(os.environ.get("CC") or "") or next(
        filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None
    )
    told = f"Python {sys.version.split()[0]}, torch {torch.__version__}, C compiler {found or 'none'}"
    missing = found is None and torch.cuda.is_available()
    return ok_unless(
        missing, "software", told, "Triton needs one to start: load a module with gcc, or set CC", State.WRONG
    )


def _write(path: Path, size: int) -> float:
    """Seconds until a new file of so many bytes is on the disk under its name."""
    content = os.urandom(4096) * (size // 4096)
    started = time.perf_counter()
    with path.with_suffix(".new").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".new").replace(path)
    return time.perf_counter() - started
