"""Sends W&B what happened to a run besides its steps: markers in its history, and alerts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from caduceus.monitor.following import Follower
from caduceus.run.events import events_path

_AFTER = ("start", "rewind")
"""Events whose step is the one before the first step that they concern."""
_ALERTS = {
    "skipped": ("A step was skipped", "WARN"),
    "rewind": ("The loss jumped, and the run went back", "WARN"),
    "stalled": ("The run has stalled", "ERROR"),
    "evaluation failed": ("An evaluation failed, and its numbers are missing", "WARN"),
    "failed": ("The run has failed", "ERROR"),
}


class Happenings:
    """Follows RUN/events.jsonl. `last`: the newest step that W&B has; events up to it were sent."""

    def __init__(self, run: Path, last: int, since: float) -> None:
        self._follower = Follower(events_path(run))
        self._last = last
        self._since = since
        self._waiting: list[dict[str, Any]] = []

    def poll(self, alert: Callable[[str, str, str], None] | None) -> None:
        """Read new events; call `alert(title, text, level)` for those after `since` that deserve one."""
        for event in self._follower.poll():
            kind, step = event.get("event"), event.get("step")
            if isinstance(step, int) and (step > self._last or (step == self._last and kind in _AFTER)):
                self._waiting.append(event)
            if alert is not None and kind in _ALERTS and event.get("time", 0) > self._since:
                title, level = _ALERTS[kind]
                alert(title, _words(event), level)

    def markers(self, step: int) -> dict[str, float]:
        """Entries for the row of a step: the events up to it that were not sent before."""
        now = [event for event in self._waiting if event["step"] <= step]
        self._waiting = [event for event in self._waiting if event["step"] > step]
        row: dict[str, float] = {}
        for event in now:
            if event["event"] == "checkpoint":
                row["events/checkpoint_seconds"] = event.get("seconds", 0)
            elif event["event"] == "start":
                row["events/start"] = event.get("number", 1)
                row |= {"events/requeues": event["requeues"]} if "requeues" in event else {}
            elif event["event"] == "rewind":
                row["events/rewind_from"] = event.get("after", event["step"])
        return row


def _words(event: dict[str, Any]) -> str:
    told = [event["reason"]] if "reason" in event else []
    told += [f"{name.replace('_', ' ')} {event[name]}" for name in ("loss", "grad_norm") if name in event]
    told += [f"from step {event['after']}"] if "after" in event else []
    where = [] if event.get("step") is None else [f"step {event['step']}"]
    return ": ".join([*where, ", ".join(told)])
