"""Folders on a node's own disk, in contrast to those that all nodes share. Imports no torch."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def node_folder(environment: Mapping[str, str]) -> Path:
    """This user's folder on the node's own disk."""
    return Path(environment.get("SLURM_TMPDIR") or tempfile.gettempdir()) / f"caduceus-{os.getuid()}"


def compiler_caches(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that put the compilers' caches on the node's own disk: many ranks would overload a shared
    home.
    """
    folder = node_folder(environment)
    return {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
