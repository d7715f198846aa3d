"""What happened to a run besides its steps: RUN/events.jsonl, a line each, of all starts. Imports no torch.

Unlike rows of metrics.jsonl, which are made again after a kill, lines are never removed.
"""

import time
from pathlib import Path
from typing import Any

from caduceus.files import append_json_line, read_json_lines

KINDS = (
    *("start", "stage", "skipped", "rewind", "checkpoint", "stalled", "stopped", "failed", "finished"),
    "evaluation failed",
)
"""stage: one of several begins; stopped: with a checkpoint, to go on later; skipped: a step that updated nothing."""


def events_path(run: Path) -> Path:
    return run / "events.jsonl"


def record_event(run: Path, event: str, step: int | None, **facts: Any) -> None:
    """Write down that something happened after a step. A disk that takes nothing more loses it."""
    row = {"time": round(time.time(), 3), "step": step, "event": event, **facts}
    try:
        append_json_line(events_path(run), row)
    except OSError:
        return


def read_events(run: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first."""
    rows = [row for row in read_json_lines(events_path(run)) if isinstance(row, dict)]
    return [row for row in rows if row.get("event") in KINDS and isinstance(row.get("time"), int | float)]
