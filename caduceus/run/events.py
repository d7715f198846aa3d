"""RUN/events.jsonl: what happened to a run besides its steps, one line per event, of all starts. Imports no torch.

Rows of metrics.jsonl are removed and made again after a kill; these lines are never removed.
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
    """Append an event that happened after a step. Where the disk fails or is full, the event is lost."""
    row = {"time": round(time.time(), 3), "step": step, "event": event, **facts}
    try:
        append_json_line(events_path(run), row)
    except OSError:
        return


def read_events(run: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first."""
    rows = [row for row in read_json_lines(events_path(run)) if isinstance(row, dict)]
    return [row for row in rows if row.get("event") in KINDS and isinstance(row.get("time"), int | float)]
