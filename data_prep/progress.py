"""Shows the progress of long work on standard error: a live line on a terminal, occasional lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TextIO

LIVE_SECONDS = 0.2
LOG_SECONDS = 30.0


class Progress:
    """Reports `label done/total unit, rate, time left` during work that takes more than a few seconds.

    Use it as a context manager, and count with `add`. `total` is None where it is not known.
    """

    def __init__(self, label: str, total: int | None, unit: str = "B", stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._started = time.monotonic()
        self._next_report = self._started + (1.0 if self._live else LOG_SECONDS)
        self._drawn = False

    def add(self, amount: int) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + (LIVE_SECONDS if self._live else LOG_SECONDS)
        self._drawn = True
        self._stream.write(f"\r\x1b[K{self._line(now)}" if self._live else f"{self._line(now)}\n")
        self._stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn and self._live:
            self._stream.write(f"\r\x1b[K{self._line(time.monotonic())}\n")
            self._stream.flush()

    def _line(self, now: float) -> str:
        seconds = max(now - self._started, 1e-9)
        rate = self.done / seconds
        line = f"{self.label}  {format_amount(self.done, self.unit)}"
        if self.total:
            line += f" of {format_amount(self.total, self.unit)} ({100 * self.done / self.total:.0f} %)"
        line += f", {format_amount(rate, self.unit)}/s"
        if self.total and rate > 0:
            line += f", {format_seconds((self.total - self.done) / rate)} left"
        return line


def format_amount(amount: float, unit: str) -> str:
    """An amount with a decimal prefix, such as `12.3 MB`."""
    for prefix in ("", "k", "M", "G"):
        if abs(amount) < 1000:
            return f"{amount:.0f} {unit}" if not prefix else f"{amount:.1f} {prefix}{unit}"
        amount /= 1000
    return f"{amount:.1f} T{unit}"


def format_seconds(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def note(message: str) -> None:
    """Print a line for the user that needs no action."""
    print(f"note: {message}", file=sys.stderr)
