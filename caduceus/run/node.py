"""What a process finds on its node, as against what all nodes share. Imports no torch."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def node_folder(environment: Mapping[str, str]) -> Path:
    """A folder of this user's on the node's own disk."""
    return Path(environment.get("SLURM_TMPDIR") or tempfile.gettempdir()) / f"caduceus-{os.getuid()}"


def compiler_caches(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that put the compilers' caches on the node's own disk: many ranks would storm a shared home."""
    folder = node_folder(environment)
    return {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
