"""Packed sequences on backends that know nothing of them: every sequence is run by itself.

`starts` (B, L) bool is true at the first position of each packed sequence. A start cuts the row: neither states nor
convolution taps cross it, in either direction.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def run_apart(starts: Tensor, op: Callable[[int, slice], Tensor], length_dim: int = -2) -> Tensor:
    """Results (…, B, L, E) of `op(b, positions)` (…, 1, l, E), one call per sequence, put into their places."""
    rows = []
    for b, row in enumerate(starts):
        borders = [0, *(row.nonzero().flatten().tolist()), len(row)]
        pieces = [op(b, slice(i, j)) for i, j in pairwise(borders) if i < j]
        rows.append(torch.cat(pieces, dim=length_dim))
    return torch.cat(rows, dim=length_dim - 1)
