"""What is compiled ahead of time, and the programs for it that Triton brings."""

from importlib.util import find_spec
from pathlib import Path

RECORDS = Path(__file__).with_name("resources")
"""What was made of the kernels, in a file for each release of Triton."""
SCAN = ("chunk_state", "chunk_carry", "scan_forward", "chunk_adjoint", "scan_replay", "gather_pieces", "scan_backward")
SCAN += ("scatter_pieces", "scan_keep", "chunk_adjoint_dz")
GATED = ("gated_norm_forward", "gated_norm_backward")
SSD = ("ssd_chunk_state", "ssd_carry", "ssd_output", "ssd_input_gradient", "ssd_state_gradient")
RUNS = (
    ("90", "bf16", "published"),
    ("80", "bf16", "one"),
    ("80", "fp32", "one"),
    ("90", "bf16", "rest"),
    ("80", "bf16", "32", *SCAN),
    ("90", "bf16", "64", *SCAN),
    ("80", "fp32", "gated", *GATED),
    ("90", "bf16", "gated", *GATED),
    ("90", "bf16", "ssd", *SSD),
)
"""What is compiled: compute capability, element type, what is launched, and which kernels if not all."""


def has_tools() -> bool:
    """Whether there are an assembler and a disassembler for NVIDIA's GPUs."""
    spec = find_spec("triton")
    if spec is None:
        return False
    binaries = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    return all((binaries / name).exists() for name in ("ptxas", "cuobjdump"))
