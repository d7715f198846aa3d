"""What a step leaves to the next one, so that all ranks meet, and a host waits for its GPU, once a step.

The one exchange of a step comes before its update, for it decides on that. With the losses go which rank failed, what
ranks wish, and what they measured of the step before, whose row is complete then: a step late.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from caduceus.data.loader import Batch
from caduceus.distributed.ranks import Ranks
from caduceus.train.metrics import Measured

Row = dict[str, Any]


class Handover:
    """Attributes: `wished`, for each of the `wishes` whether a rank has had it; `spare`, a micro-batch of the step
    before, which stands for one that cannot be read until all know of that."""

    def __init__(self, wishes: Callable[[], Sequence[bool]] = tuple) -> None:
        self._wishes = wishes
        self.wished: list[bool] = []
        self.spare: Batch | None = None
        self._last: tuple[Row, Measured] | None = None
        self._complete: list[Row] = []

    def meet(self, ranks: Ranks, numbers: Tensor, error: BaseException | None) -> Tensor:
        """The (n,) numbers of each rank, (world, n) float64 on the CPU: all that a step reads. Where a rank has an
        error, all raise, as of `Ranks.raise_together`."""
        own = torch.tensor([ranks.weight_of(error), *self._wishes()], dtype=torch.float64)
        parts = [own.to(numbers.device, non_blocking=True), numbers, self._of_last(numbers.device)]
        rows = ranks.gather(torch.cat(parts))
        weights, wished, found, of_last = rows.split([1, len(own) - 1, len(numbers), len(parts[-1])], dim=1)
        self._take(of_last, wished)
        ranks.raise_for(int(weights.max()), error)
        return found

    def leave(self, row: Row, measured: Measured) -> None:
        """A row that the next exchange completes by what was measured."""
        self._last = row, measured

    def settle(self, ranks: Ranks) -> None:
        """Complete the row that was left, and ask for wishes, in an exchange of their own."""
        own = torch.tensor(self._wishes(), dtype=torch.float64)
        of_last = self._of_last(ranks.device)
        rows = ranks.gather(torch.cat([own.to(of_last.device, non_blocking=True), of_last]))
        wished, of_last = rows.split([len(own), len(of_last)], dim=1)
        self._take(of_last, wished)

    def complete(self) -> list[Row]:
        """The rows that have become complete since this was asked."""
        rows, self._complete = self._complete, []
        return rows

    def grant(self) -> list[bool]:
        """What was wished; it is forgotten."""
        wished, self.wished = self.wished, []
        return wished

    def _of_last(self, device: torch.device) -> Tensor:
        if self._last is None:
            return torch.zeros(0, dtype=torch.float64, device=device)
        return self._last[1].numbers(device)

    def _take(self, of_last: Tensor, wished: Tensor) -> None:
        now = wished.any(0).tolist()
        self.wished = [any(of) for of in zip(now, self.wished, strict=True)] if self.wished else now
        if self._last is not None:
            row, measured = self._last
            row |= measured.row(of_last)
            self._complete.append(row)
            self._last = None
