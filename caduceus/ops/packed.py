"""Packed sequences on backends without support for them: every sequence is run alone.

`starts` (B, L) bool is true at the first position of each packed sequence. A start cuts the row: neither states nor
convolution taps cross it, in either direction.
"""

from collections.abc import Callable
from itertools import pairwise, repeat

import torch
from torch import Tensor


def run_apart(starts: Tensor, op: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
    """A function that runs `op` on each sequence's pieces (…, 1, l, E) of the operands, and joins the results (…, B, L,
    E).

    Each operand (…, B, L, C) is split in one call. The gradients of the pieces are then concatenated; with slices, each
    gradient would be a tensor of the full length, and adding up one for each sequence would take quadratic time.
    """
    by_row = (repeat(None) if t is None else t.unsqueeze(-4).unbind(-3) for t in operands)
    rows = []
    for row, *tensors in zip(starts, *by_row, strict=False):
        borders = sorted({0, *row.nonzero().flatten().tolist(), len(row)})
        lengths = [j - i for i, j in pairwise(borders)] or [0]
        pieces = zip(*(repeat(None, len(lengths)) if t is None else t.split(lengths, -2) for t in tensors), strict=True)
        rows.append(torch.cat([op(*piece) for piece in pieces], dim=-2))
    return torch.cat(rows, dim=-3)
