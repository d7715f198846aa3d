"""A profile of a few steps: where the time of CPU and GPU goes, and on GPUs what takes memory."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity

from caduceus.config import Config
from caduceus.config.run import profiled_steps
from caduceus.devices import is_gpu
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError

_ROWS = 20
_NAME_WIDTH = 38
"""Letters of an operator's name in the table, which thus fits a terminal of 80 columns."""
_MOST_EVENTS = 100_000
"""Number of the latest allocations that a memory snapshot holds."""

_log = logging.getLogger(__name__)


class Profile:
    """Profiles the steps of `monitor.profile` on the ranks of `monitor.profile_ranks`, once in a start.

    Traces go to RUN/profile/steps-10-13-rank0.json.gz, for chrome://tracing or ui.perfetto.dev, snapshots of GPU memory
    to …-memory.pickle, for pytorch.org/memory_viz. A failure of the profiler does not end the run. Raises `UserError`
    for a rank that does not exist.
    """

    def __init__(self, config: Config, run: Path, ranks: Ranks) -> None:
        monitor = config.monitor
        self._steps = profiled_steps(monitor.profile) if monitor.profile else None
        if self._steps is None:
            return
        unknown = [rank for rank in monitor.profile_ranks if rank >= ranks.world]
        if unknown:
            raise UserError(
                f"monitor.profile_ranks: there is no rank {unknown[0]} among {ranks.world}; they begin at 0"
            )
        first, last = self._steps
        self._stem = run / "profile" / f"steps-{first}-{last}-rank{ranks.rank}"
        self._cuda = is_gpu(ranks.device)
        self._profiler: torch.profiler.profile | None = None
        if ranks.rank not in monitor.profile_ranks:
            self._steps = None

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """A context for step number `step`, whether it is profiled or not."""
        if self._steps is None:
            yield
            return
        if self._profiler is None and step > self._steps[0]:
            self._steps = None
            _log.warning("monitor.profile: the run has already passed these steps; give steps after %d", step - 1)
        elif self._profiler is None and step == self._steps[0]:
            self._begin()
        yield
        if self._profiler is not None and step >= self._steps[1]:
            self._end()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        try:
            if self._cuda:
                torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
            self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
            self._profiler.start()
        except RuntimeError as error:
            self._give_up(error)

    def _end(self) -> None:
        profiler, steps = self._profiler, self._steps
        self._profiler = self._steps = None
        try:
            profiler.stop()
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            trace = self._stem.with_name(f"{self._stem.name}.json.gz")
            profiler.export_chrome_trace(str(trace))
            kept = [trace]
            if self._cuda:
                kept.append(self._stem.with_name(f"{self._stem.name}-memory.pickle"))
                torch.cuda.memory._dump_snapshot(str(kept[-1]))
                torch.cuda.memory._record_memory_history(enabled=None)
            table = _table(profiler.key_averages(), self._cuda)
            where = ", ".join(map(str, kept))
            _log.info("profile of the steps %d to %d: %s; what took longest:\n%s", *steps, where, table)
        except (RuntimeError, OSError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._steps = self._profiler = None
        _log.warning("monitor.profile: no profile was made (%s)", error)


def _table(operators: Sequence[FunctionEventAvg], cuda: bool) -> str:
    """The operators that took longest by themselves, on the GPU if there is one: their share, and milliseconds."""
    device = "device" if cuda else "cpu"

    def alone(operator: FunctionEventAvg) -> float:
        return getattr(operator, f"self_{device}_time_total")

    whole = sum(map(alone, operators)) or 1.0
    where = "GPU" if cuda else "CPU"
    lines = [f"{'operator':<{_NAME_WIDTH}} {'share':>6} {where + ' ms':>10} {'with callees':>12} {'calls':>7}"]
    for operator in sorted(operators, key=alone, reverse=True)[:_ROWS]:
        name = operator.key if len(operator.key) <= _NAME_WIDTH else operator.key[: _NAME_WIDTH - 1] + "…"
        own, total = alone(operator) / 1000, getattr(operator, f"{device}_time_total") / 1000
        share = alone(operator) / whole
        lines.append(f"{name:<{_NAME_WIDTH}} {share:>6.1%} {own:>10,.3f} {total:>12,.3f} {operator.count:>7,}")
    return "\n".join(lines)
