"""Shows a run: a live panel of four lines in a terminal, occasional plain lines elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from caduceus.monitor.view import View, clock

QUIET_SECONDS = 30.0
"""Seconds between progress lines where there is no terminal."""
_WIDEST = 110
_TERMINAL_SECONDS = 0.2

_log = logging.getLogger(__name__)


class Terminal:
    """Shows one run while it trains in this process, unless `shown` is False. Log messages appear above the panel."""

    def __init__(self, view: View, shown: bool = True) -> None:
        self._view, self._is_shown = view, shown
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._shown = -QUIET_SECONDS
        self._ending = contextlib.ExitStack()
        if shown and self._console.is_terminal and _log.isEnabledFor(logging.INFO):
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            self._ending.enter_context(self._live)
            self._ending.enter_context(_log_above_the_panel())
            self._draw()

    def close(self) -> None:
        if self._live is not None:
            self._draw()
        with contextlib.suppress(OSError):  # the terminal is gone
            self._ending.close()

    def refresh(self, last: bool = False) -> None:
        """Show the state after a new training row, unless one was shown a moment ago."""
        now = time.monotonic()
        if not self._is_shown or (
            not last and now - self._shown < (_TERMINAL_SECONDS if self._live else QUIET_SECONDS)
        ):
            return
        self._shown = now
        if self._live is not None:
            self._draw()
        else:
            _log.info("%s", plain_line(self._view))

    def _draw(self) -> None:
        """Show the panel. Its failure does not end the run: a terminal may be closed while the run trains for weeks."""
        try:
            self._view.look()
            self._live.update(panel([self._view], self._console.width), refresh=True)
        except Exception as error:
            self._live = None
            with contextlib.suppress(OSError):
                self._ending.close()
            _log.warning("the panel cannot be shown any more (%s: %s); plain lines follow", type(error).__name__, error)

    def tell_validation(self, line: str) -> None:
        """Show a line that stays."""
        if self._is_shown:
            _log.info("%s", line)


def panel(views: Sequence[View], width: int) -> RenderableType:
    """Four lines per run, none wider than `width`."""
    width = min(width, _WIDEST)
    lines: list[RenderableType] = []
    for view in views:
        lines += [*([Text()] if lines else []), _bar(view, width), *(_line(text, width) for text in _texts(view))]
    return Group(*lines)


def plain_line(view: View) -> str:
    """The state of a run in one line."""
    row = view.row
    parts = [_count(view), f"loss {_number(row.get('loss'))}"]
    if "lr" in row:
        parts.append(f"lr {row['lr']:.2e}  grad norm {_number(row.get('grad_norm'), 2)}")
    if view.bases_per_second is not None:
        parts.append(f"{view.bases_per_second:,.0f} bases/s")
    if view.seconds_left is not None:
        parts.append(f"{clock(view.seconds_left)} left")
    return "  ".join(parts)


def _count(view: View) -> str:
    stage = f" (stage {view.row['stage']})" if "stage" in view.row else ""
    return f"step {view.step:,}/{view.steps:,}{stage}"


def _bar(view: View, width: int) -> RenderableType:
    count = _count(view)
    share = f"{view.step / view.steps:.1%}"
    name = view.name if len(view.name) <= 24 else view.name[:23] + "…"
    room = width - len(name) - len(count) - len(share) - 6
    if room < 10:
        return _line(f"[bold]{name}[/]  {count}  {share}", width)
    line = Table.grid(padding=(0, 2))
    line.add_row(Text(name, "bold"), ProgressBar(view.steps, view.step, width=room), count, share)
    return line


def _texts(view: View) -> list[str]:
    loss = f"loss [bold]{_number(view.loss)}[/]"
    if view.trend is not None:
        loss += f" {'↓' if view.trend < 0 else '↑'}{abs(view.trend):.4f}"
    valid = "valid -"
    if view.valid is not None:
        valid = f"valid [bold]{view.valid[1]:.4f}[/] at {view.valid[0]:,}"
        if view.best_valid != view.valid:
            valid += f", best {view.best_valid[1]:.4f} at {view.best_valid[0]:,}"
    rate = "rate -"
    if view.bases_per_second is not None:
        rate = f"{_short(view.bases_per_second)} bases/s"
    if view.seconds_per_step is not None:
        rate += f"   {_short_seconds(view.seconds_per_step)} a step"
    left = "time left -" if view.seconds_left is None else f"time left [bold]{clock(view.seconds_left)}[/]"
    memory = view.row.get("peak_memory_bytes")
    held = "memory -" if memory is None else f"memory {memory / 2**30:.1f} GiB"
    kept = "no checkpoint yet"
    if view.checkpoint:
        kept = f"checkpoint {view.checkpoint:,} ({_ago(time.time() - view.checkpoint_time)} ago)"
    lr = f"lr {view.row['lr']:.2e}" if "lr" in view.row else "lr -"
    starts = f"start {view.starts}" if view.starts else ""
    return [f"{loss}   {valid}", f"{rate}   {left}   {lr}", f"{held}   {kept}   {starts}".rstrip()]


def _line(markup: str, width: int) -> Text:
    text = Text.from_markup(markup)
    text.no_wrap = True
    text.truncate(width, overflow="ellipsis")
    return text


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 10 * size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f}"


def _short_seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


@contextlib.contextmanager
def _log_above_the_panel() -> Iterator[None]:
    """Let the log's handlers print to the current sys.stderr, which a live panel replaces: above the panel, not into
    it.
    """
    moved = [
        (handler, handler.setStream(sys.stderr))
        for handler in logging.getLogger().handlers
        if type(handler) is logging.StreamHandler and handler.stream is sys.__stderr__
    ]
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
