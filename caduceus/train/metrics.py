"""The numbers of a training row besides the loss: where the time goes, the machine's speed, how ranks differ."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from caduceus.config import Config
from caduceus.data.loader import TrainLoader
from caduceus.devices import is_gpu
from caduceus.distributed.ranks import Ranks
from caduceus.train.roofline import utilization
from caduceus.train.vitals import Vitals

CLOCK_KEYS = frozenset(
    {
        "seconds",
        "tokens_per_second",
        "tokens_per_second_per_gpu",
        "data_seconds",
        "forward_backward_seconds",
        "optimizer_seconds",
        "communication_seconds",
        "straggler_seconds",
        "peak_memory_bytes",
        "mfu",
        "scan_roofline",
        "seconds_left",
    }
)
"""Keys whose values depend on the machine and its load; all others are the same when a run is repeated."""

_LAPS = ("data", "communication", "forward", "backward", "exchange", "optimizer")
_ALONE = [_LAPS.index(name) for name in ("data", "forward", "backward")]
"""Laps in which a rank does not wait for others, unless they share parameters or sequences."""


class StepClock:
    """Sums up the laps of one step. On a GPU it reads the GPU's clock, and only at the end, as reading waits for the
    GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = is_gpu(device)
        self._marks = [("start", self._now())]

    def lap(self, name: str) -> None:
        """Count the time since the last lap for `name`, one of `_LAPS`."""
        self._marks.append((name, self._now()))

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """A context in which a backward lap ends with the last gradient that this rank computes; what follows is the
        exchange.

        It does nothing where ranks share the parameters, as gradients are then ready only after the exchange.
        """
        first = next(model.parameters())
        if isinstance(first, DTensor) or not first.requires_grad:
            yield
            return
        handle = first.register_post_accumulate_grad_hook(lambda _: self.lap("backward"))
        try:
            yield
        finally:
            handle.remove()

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind of lap."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        totals = dict.fromkeys(_LAPS, 0.0)
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            totals[name] += before.elapsed_time(after) / 1000 if self._cuda else after - before
        return totals

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Measured:
    """The measurements of all ranks in a step of `bases` bases: `numbers` of each rank, and the `row` made of them.

    The parts of the step's time are means over ranks. `communication_seconds` is the time that the loop itself waits
    for other ranks; transfers inside the backward pass (and, when sharded, the forward pass) count to those passes.
    `straggler_seconds` is the difference between the slowest and the fastest rank in the time for data, forward pass,
    and backward pass up to the rank's own last gradient: all that comes before ranks wait for each other. Ranks that
    share a sequence also wait within the passes, so that the difference appears smaller; where ranks share parameters,
    the backward pass is left out for that reason.
    """

    def __init__(
        self, config: Config, ranks: Ranks, loader: TrainLoader, clock: StepClock, vitals: Vitals, bases: int
    ) -> None:
        self._config, self._ranks, self._clock, self._vitals, self._bases = config, ranks, clock, vitals, bases
        self._others = [_peak_memory(ranks.device), loader.substituted]
        self._of_vitals = vitals.numbers()
        self._epochs = {f"epoch/{name}": epoch for name, epoch in loader.epochs().items()} if vitals.on else {}

    def numbers(self, device: torch.device) -> Tensor:
        """What this rank saw, (n,) float64. Its clock is read: what a GPU had to do in the step must be done."""
        own = torch.tensor([*self._clock.seconds().values(), *self._others], dtype=torch.float64)
        return torch.cat([own.to(device, non_blocking=True), self._of_vitals.to(device, non_blocking=True)])

    def row(self, rows: Tensor) -> dict[str, float | int]:
        """The entries of the step's row from the `numbers` of all ranks, (world, n) on the CPU."""
        ranks, own = self._ranks, len(_LAPS) + len(self._others)
        rows, of_vitals = rows.tensor_split([own], dim=1)
        data, communication, forward, backward, exchange, optimizer = rows[:, : len(_LAPS)].mean(0).tolist()
        seconds = rows[:, : len(_LAPS)].sum(1).max().item()
        alone = rows[:, _ALONE].sum(1)
        tokens_per_second = self._bases / seconds
        return {
            "substituted_samples": int(rows[:: ranks.world // ranks.data_world, -1].sum()),  # which all count alike
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_gpu": tokens_per_second / ranks.world,
            "seconds": seconds,
            "data_seconds": data,
            "forward_backward_seconds": forward + backward + exchange,
            "optimizer_seconds": optimizer,
            "communication_seconds": communication,
            "straggler_seconds": (alone.max() - alone.min()).item(),
            "peak_memory_bytes": int(rows[:, -2].max()),
            **utilization(self._config, tokens_per_second / ranks.world, ranks.device),
            **self._vitals.row(of_vitals),
            **self._epochs,
        }


def _peak_memory(device: torch.device) -> int:
    """Peak of the bytes that torch has held on this rank's GPU since the start, or on a CPU that this process
    has held.
    """
    if is_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
