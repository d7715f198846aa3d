"""The scan of a sequence that ranks share, with the ranks one after another in this process."""

from types import SimpleNamespace

import torch
from torch import Tensor

from caduceus.ops.across_ranks import SlicedScan, carried
from caduceus.ops.operands import ScanOperands

ALONG_LENGTH = (True, True, False, True, True, False, True, False)
"""Which of u, dt, A, B, C, D, z, dt_bias are cut into slices."""


def scan_in_slices(
    sliced: type[SlicedScan], operands: ScanOperands, cuts: list[int], softplus: bool, reverse: bool, dy: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """y and the operands' gradients, from slices of the lengths `cuts` and what would travel between their ranks."""
    pieces = [
        [t] * len(cuts) if t is None or not along else t.split(cuts, dim=-2)
        for t, along in zip(operands, ALONG_LENGTH, strict=True)
    ]
    ranks = [SimpleNamespace(rank=rank, size=len(cuts)) for rank in range(len(cuts))]
    arriving = dy.split(cuts, dim=-2)
    forward = [sliced(ScanOperands(*piece), softplus, reverse) for piece in zip(*pieces, strict=True)]
    ends, steps = (torch.stack(found) for found in zip(*(scan.end_state() for scan in forward), strict=True))
    entering = [carried(ends, steps, operands.A, rank, reverse) for rank in ranks]
    y, kept = zip(*(scan.outputs(state) for scan, state in zip(forward, entering, strict=True)), strict=True)
    back = [sliced(ScanOperands(*piece), softplus, reverse) for piece in zip(*pieces, strict=True)]
    adjoints = torch.stack([scan.initial_gradient(g, k) for scan, g, k in zip(back, arriving, kept, strict=True)])
    final = [carried(adjoints, steps, operands.A, rank, not reverse) for rank in ranks]
    found = [scan.gradients(g, last, k) for scan, g, last, k in zip(back, arriving, final, kept, strict=True)]
    gradients = [
        None if parts[0] is None else torch.cat(parts, dim=-2) if along else sum(parts)
        for parts, along in zip(zip(*found, strict=True), ALONG_LENGTH, strict=True)
    ]
    return torch.cat(y, dim=-2), gradients
