"""Settings and checks of a process on its node, before it trains."""

import tempfile
from collections.abc import Mapping

from caduceus.errors import NodeError
from caduceus.run.node import compiler_caches, node_folder


def node_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables: numbers of threads as the job asks, and compilers' caches on the node's own disk, not a
    shared one.
    """
    defaults = compiler_caches(environment)
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        defaults |= {"OMP_NUM_THREADS": cpus, "NUMBA_NUM_THREADS": cpus}
    return defaults


def check_node(environment: Mapping[str, str], needs_gpus: bool) -> None:
    """Raise `NodeError` where this node has no working disk of its own or lacks GPUs that SLURM gave the job."""
    node = environment.get("SLURMD_NODENAME", "this machine")
    cache = node_folder(environment)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        raise NodeError(f"{node}: {cache} cannot be written ({error.strerror})") from None
    given = visible_gpus(environment)
    if needs_gpus and given:
        import torch

        working = torch.cuda.device_count()
        if working < (1 if _are_slices(given) else len(given)):
            raise NodeError(f"{node}: torch sees {working} of the {len(given)} GPUs {','.join(given)}")


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs of CUDA_VISIBLE_DEVICES: numbers, GPU-… or MIG-…, up to the first entry that is not a GPU.

    SLURM writes NoDevFiles for a job without GPUs.
    """
    names = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    is_gpu = [name.isdigit() or name.startswith(("GPU-", "MIG-")) for name in names]
    return names[: is_gpu.index(False)] if False in is_gpu else names


def own_slice(environment: Mapping[str, str], local_rank: int) -> dict[str, str]:
    """The environment variable that gives a process its own one of several MIG slices, as CUDA shows only the first."""
    given = visible_gpus(environment)
    return {"CUDA_VISIBLE_DEVICES": given[local_rank % len(given)]} if _are_slices(given) else {}


def _are_slices(gpus: list[str]) -> bool:
    return any(gpu.startswith("MIG-") for gpu in gpus)
