"""What a process sets and checks on its node before it trains."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from caduceus.errors import NodeError


def node_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Thread counts as the job asked for them, and compilers' caches on the node's own disk, not a shared one."""
    cache = _cache(environment)
    defaults = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        defaults |= {"OMP_NUM_THREADS": cpus, "NUMBA_NUM_THREADS": cpus}
    return defaults


def check_node(environment: Mapping[str, str], needs_gpus: bool) -> None:
    """Raise `NodeError` where this node has no working disk of its own or lacks GPUs that SLURM gave the job."""
    node = environment.get("SLURMD_NODENAME", "this machine")
    cache = _cache(environment)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        raise NodeError(f"{node}: {cache} cannot be written ({error.strerror})") from None
    given = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if needs_gpus and given:
        import torch

        working = torch.cuda.device_count()
        if working < len(given):
            raise NodeError(f"{node}: torch sees {working} of the {len(given)} GPUs {','.join(given)}")


def _cache(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("SLURM_TMPDIR") or tempfile.gettempdir()) / f"caduceus-{os.getuid()}"
