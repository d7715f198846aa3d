"""The numbers of a training row besides the loss: where the time goes, the machine's speed, how ranks differ."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from caduceus.config import Config
from caduceus.data.loader import TrainLoader
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
        self._cuda = device.type == "cuda"
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


def measurements(
    config: Config, ranks: Ranks, loader: TrainLoader, clock: StepClock, vitals: Vitals, bases: int
) -> dict[str, float | int]:
    """The measurements of all ranks in a step of `bases` bases, collected in one exchange.

    The parts of the step's time are means over ranks. `communication_seconds` is the time that the loop itself waits
    for other ranks; transfers inside the backward pass (and, when sharded, the forward pass) count to those passes.
    `straggler_seconds` is the difference between the slowest and the fastest rank in the time for data, forward pass,
    and backward pass up to the rank's own last gradient: all that comes before ranks wait for each other. Ranks that
    share a sequence also wait within the passes, so that the difference appears smaller; where ranks share parameters,
    the backward pass is left out for that reason.
    """
    laps = clock.seconds()
    mine = [*laps.values(), _peak_memory(ranks.device), loader.substituted]
    rows, of_vitals = ranks.gather([*mine, *vitals.numbers()]).tensor_split([len(mine)], dim=1)
    data, communication, forward, backward, exchange, optimizer = rows[:, : len(_LAPS)].mean(0).tolist()
    seconds = rows[:, : len(_LAPS)].sum(1).max().item()
    alone = rows[:, _ALONE].sum(1)
    tokens_per_second = bases / seconds
    return {
        "substituted_samples": int(rows[:: ranks.world // ranks.data_world, -1].sum()),  # all ranks count them alike
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_gpu": tokens_per_second / ranks.world,
        "seconds": seconds,
        "data_seconds": data,
        "forward_backward_seconds": forward + backward + exchange,
        "optimizer_seconds": optimizer,
        "communication_seconds": communication,
        "straggler_seconds": (alone.max() - alone.min()).item(),
        "peak_memory_bytes": int(rows[:, -2].max()),
        **utilization(config, tokens_per_second / ranks.world, ranks.device),
        **vitals.row(of_vitals),
        **({f"epoch/{species}": epoch for species, epoch in loader.epochs().items()} if vitals.on else {}),
    }


def _peak_memory(device: torch.device) -> int:
    """Peak of the bytes that torch has held on this rank's GPU since the start, or on a CPU that this process
    has held.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
