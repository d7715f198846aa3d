"""One dial: rules turn a size, or a budget of computation, into the keys of a run. Imports no torch.

The rules: a table gives width and depth. A global batch has 2^20 bases, as published. Vectors have the published
learning rate; the rates of matrices fall with the width beyond that of the published models (as in muP, Yang et al.
2022, but without its initial values and multipliers). A run takes the published 10,000 steps, or as many as give 100
bases per parameter where that is more.
"""

import math
from typing import Any

from caduceus.errors import UserError

DIAL = ("size", "compute")
"""Names that stand beside the sections of a YAML file, or are typed as size=30M."""
SIZES = {"8M": (256, 16), "30M": (512, 17), "90M": (768, 22), "300M": (1024, 43)}
"""Number of parameters, roughly -> width and depth of a Caduceus."""
MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")
"""Kinds of parameters whose learning rates fall with the width, as the number of terms that they sum over grows with
it.
"""
PUBLISHED_WIDTH = 256
PUBLISHED_STEPS = 10_000
BASES_OF_A_BATCH = 1 << 20
BASES_PER_PARAMETER = 100
BASES_OF_A_MICRO_BATCH = 1 << 17
"""On a GPU at the published width; fewer at larger ones."""
FLOPS_PER_PARAMETER = 12
"""FLOP per parameter and base: forward and backward, of both strands."""


def turned(size: str | None, compute: float | None, seq_len: int) -> dict[str, dict[str, Any]]:
    """The keys of a run of a size (8M, …), or of the largest size that `compute` FLOP can train for as many steps as
    the rules ask.

    With `compute`, all of it is spent: the run takes more steps, or fewer where it is too little for the smallest size.
    Raises `UserError` where there is no such size, or both arguments are given.
    """
    if size is not None and compute is not None:
        raise UserError("compute: decides the size; leave size out")
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
