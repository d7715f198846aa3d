"""The programs that Triton brings for compiling ahead of time."""

from importlib.util import find_spec
from pathlib import Path


def has_tools() -> bool:
    """Whether there are an assembler and a disassembler for NVIDIA's GPUs."""
    spec = find_spec("triton")
    if spec is None:
        return False
    binaries = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    return all((binaries / name).exists() for name in ("ptxas", "cuobjdump"))
