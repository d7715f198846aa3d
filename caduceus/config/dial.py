"""One dial: a size, or a budget of computation, to the keys of a run, by rules. Imports no torch.

The rules: width and depth by a ladder. 2^20 bases per global batch, as published. The published rate for vectors; the
rates of matrices fall with the width beyond that of the published models (as in muP, Yang et al. 2022, of which initial
values and multipliers are not taken). The published 10,000 steps, or 100 bases per parameter where those are more.
"""

import math
from typing import Any

from caduceus.errors import UserError

DIAL = ("size", "compute")
"""Names beside the sections of a YAML file, or typed as size=30M."""
SIZES = {"8M": (256, 16), "30M": (512, 17), "90M": (768, 22), "300M": (1024, 43)}
"""Width and depth of a Caduceus of about so many parameters."""
MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")
"""Kinds of parameters whose rates fall with the width: what they sum over grows with it."""
PUBLISHED_WIDTH = 256
PUBLISHED_STEPS = 10_000
BASES_OF_A_BATCH = 1 << 20
BASES_PER_PARAMETER = 100
BASES_OF_A_MICRO_BATCH = 1 << 17
"""On a GPU at the published width; fewer at larger ones."""
FLOPS_PER_PARAMETER = 12
"""And base: forward and backward, of both strands."""


def turned(size: str | None, compute: float | None, seq_len: int) -> dict[str, dict[str, Any]]:
    """The keys of a run of a size (8M, …), or of the largest size that `compute` FLOP train as long as the rules want.

    With `compute`, all of it is spent: a run takes more steps, or where it does not suffice for the smallest, fewer.
    Raises `UserError` where there is no such size, or both are given.
    """
    if size is not None and compute is not None:
        raise UserError("compute: says which size is taken; leave size out")
    if compute is not None:
        size = _largest(compute)
    if size not in SIZES:
        raise UserError(f"size: choose one of {', '.join(SIZES)}; got '{size}'")
    width, depth = SIZES[size]
    steps = steps_of(size) if compute is None else max(1, int(compute / _flops_of_a_step(size)))
    batch = max(1, BASES_OF_A_BATCH // seq_len)
    micro_batch = max(1, BASES_OF_A_MICRO_BATCH * PUBLISHED_WIDTH // width // seq_len)
    return {
        "model": {"d_model": width, "n_layer": depth},
        "train": {
            "global_batch": batch,
            "micro_batch": math.gcd(batch, 1 << (micro_batch.bit_length() - 1)),
            "steps": steps,
            "lr_scale": dict.fromkeys(MATRICES, PUBLISHED_WIDTH / width),
        },
    }


def parameters_of(size: str) -> int:
    """About how many parameters a size has."""
    return int(size.removesuffix("M")) * 1_000_000


def steps_of(size: str) -> int:
    """Optimizer steps of a size."""
    return max(PUBLISHED_STEPS, -(-BASES_PER_PARAMETER * parameters_of(size) // BASES_OF_A_BATCH))


def _flops_of_a_step(size: str) -> float:
    return float(FLOPS_PER_PARAMETER) * parameters_of(size) * BASES_OF_A_BATCH


def _largest(compute: float) -> str:
    if isinstance(compute, bool) or not isinstance(compute, int | float) or not 0 < compute < math.inf:
        raise UserError(f"compute: FLOP of a run, a number above 0 such as 1e20; got {compute!r}")
    fitting = [size for size in SIZES if _flops_of_a_step(size) * steps_of(size) <= compute]
    return fitting[-1] if fitting else next(iter(SIZES))
