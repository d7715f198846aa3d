"""Formats the output of the commands: tables, durations, and the next commands."""

import shlex
from pathlib import Path

from caduceus.commands import command


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table with columns as wide as needed; all but the first two are right-aligned."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row in [heads, *rows]:
        cells = [
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as text, such as 3 d 04:05 or 0:12:34."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{seconds:02d}"


def runs_command(action: str, path: Path) -> str:
    """The command for an action on a run directory, quoted for the shell."""
    return f"{command('caduceus-runs')} {action} {shlex.quote(str(path))}"
