"""Numbers about the network that every `monitor.every`-th step reports, by kind of parameter and by layer.

They only read: losses and updates have the same bits with and without them. Ranks collect their numbers in the exchange
with which a step ends anyway.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from caduceus.config import Config
from caduceus.data.batch import REGIONS
from caduceus.distributed.strategy import Strategy
from caduceus.model.observer import STATISTICS


class Vitals:
    """The vitals of one step. In steps that report none, `on` is False and nothing is computed."""

    def __init__(self, config: Config, strategy: Strategy, step: int) -> None:
        every = config.monitor.every
        self.on = bool(every) and step % every == 0
        self._strategy = strategy
        self._layers = config.model.n_layer
        self._told: torch.Tensor | None = None
        self._region_sums: torch.Tensor | None = None
        self._kinds: dict[str, list[int]] = {}
        self._before: list[torch.Tensor] = []
        self._squares: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def observing(self, micro_batch: int) -> Iterator[None]:
        """A context for the forward pass of micro-batch 1, 2, … of the step, of which the first is observed."""
        if not self.observes(micro_batch):
            yield
            return
        with self._strategy.network.observing() as observer:
            yield
        self.take(observer.told())

    def observes(self, micro_batch: int) -> bool:
        """Whether the forward pass of micro-batch 1, 2, … is observed."""
        return self.on and micro_batch == 1

    def take(self, told: torch.Tensor | None, region_sums: torch.Tensor | None = None) -> None:
        """Take the numbers of an `Observer` of a forward pass and its losses by region (2, 2), if there are any."""
        self._told = self._told if told is None else told
        self._region_sums = self._region_sums if region_sums is None else region_sums

    def before_update(self) -> None:
        """Take the gradients as they are before clipping, and remember the weights."""
        if not self.on:
            return
        parts = self._strategy.parts()
        for place, part in enumerate(parts):
            self._kinds.setdefault(parameter_kind(part.name), []).append(place)
        self._before = [part.weight.clone() for part in parts]
        gradients = [part.gradient for part in parts if part.gradient is not None]
        if gradients and len(gradients) == len(parts):
            self._squares["gradient"] = self._by_kind(gradients)

    def after_update(self) -> None:
        """Measure how far the weights have moved. Do not call it where the step is skipped."""
        if not self.on or not self._before:
            return
        moved = torch._foreach_sub([part.weight for part in self._strategy.parts()], self._before)
        self._squares |= {"weight": self._by_kind(self._before), "moved": self._by_kind(moved)}
        self._before = []

    def numbers(self) -> torch.Tensor:
        """The numbers of this rank, (n,) float64, to be gathered from all."""
        self._before = []
        if not self.on:
            return torch.zeros(0, dtype=torch.float64)
        told = self._told.flatten().double()
        regions = [] if self._region_sums is None else [self._region_sums.flatten().to(told.device)]
        return torch.cat([*(values.to(told.device) for values in self._squares.values()), *regions, told])

    def row(self, rows: torch.Tensor) -> dict[str, float]:
        """The entries of the step's row from the `numbers` of all ranks, (world, n) float64."""
        if not self.on:
            return {}
        count, kinds = len(self._squares) * len(self._kinds), len(self._kinds)
        totals = (rows[:, :count].sum(0) / self._strategy.copies).sqrt().split(kinds) if count else ()
        norms = dict(zip(self._squares, totals, strict=True))
        row: dict[str, float] = {}
        if "gradient" in norms:
            row |= {
                f"grad_norm/{kind}": norm for kind, norm in zip(self._kinds, norms["gradient"].tolist(), strict=True)
            }
        if "moved" in norms:
            ratios = (norms["moved"] / norms["weight"]).tolist()
            row |= {f"update_ratio/{kind}": ratio for kind, ratio in zip(self._kinds, ratios, strict=True)}
        if self._region_sums is not None:
            sums = rows[:, count : count + self._region_sums.numel()].sum(0).view(len(REGIONS), 2).tolist()
            row |= {f"loss_{name}": loss / bases for name, (loss, bases) in zip(REGIONS, sums, strict=True) if bases}
            count += self._region_sums.numel()
        layers = rows[:, count:].mean(0).view(self._layers, len(STATISTICS)).tolist()
        for place, name in enumerate(STATISTICS):
            row |= {f"{name}/{layer:02}": values[place] for layer, values in enumerate(layers)}
        return row

    def _by_kind(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sums of squares over the tensors of each kind, (kinds,) float64."""
        squares = torch.stack(torch._foreach_norm(list(tensors))).double().square()
        return torch.stack([squares[places].sum() for places in self._kinds.values()])


def parameter_kind(parameter: str) -> str:
    """The kind of a parameter, from its name: A_log for blocks.3.mixer.A_log, norm for any norm, embedding."""
    *path, last = parameter.split(".")
    return path[-1].removesuffix("_f") if last in ("weight", "bias") else last
