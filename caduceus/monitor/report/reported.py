"""The facts of a report about a run besides its rows: state, events, configuration."""

import contextlib
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from caduceus.config import config_to_dict
from caduceus.errors import UserError
from caduceus.monitor.report.history import History, read_history
from caduceus.patience import listed, patiently
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import first_cause, read_ends
from caduceus.run.events import read_events

_FRESH_SECONDS = 600
_SAME_SECONDS = 60


@dataclass(frozen=True)
class Event:
    """Something that happened to a run. step: the step, None where it is unknown. time: seconds since the epoch."""

    kind: str
    step: int | None
    time: float | None
    words: str


@dataclass(frozen=True)
class Reported:
    """A run for a report. config: {key: value}, with the value of every `auto` at the last start."""

    name: str
    path: Path
    history: History
    events: list[Event]
    state: str
    steps: int
    config: dict[str, str]


def read_run(path: Path) -> Reported:
    """Read a run directory. Raises `UserError` where it is not one, or has no rows."""
    run = RunDirectory.open(path)
    config = run.config()
    try:
        history = read_history(run.metrics_path)
    except FileNotFoundError:
        raise UserError(f"{path}: metrics.jsonl is missing; the run has made no steps yet") from None
    except OSError as error:
        raise UserError(f"{run.metrics_path}: {error.strerror}") from None
    if not history.rows:
        raise UserError(f"{run.metrics_path}: holds no training rows; the run has made no steps yet")
    events = _events(run, history)
    state = _state(run, history, events, config.train.steps)
    settings = _settings(config_to_dict(config), run.resolved_path)
    return Reported(path.resolve().name, path, history, events, state, config.train.steps, settings)


def differences(runs: list[Reported]) -> list[tuple[str, list[str]]]:
    """(key, value in each run) for every key in which the runs' configurations differ."""
    keys = sorted({key for run in runs for key in run.config})
    rows = [(key, [run.config.get(key, "–") for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _settings(config: dict[str, Any], resolved_path: Path) -> dict[str, str]:
    settings = {f"{section}.{key}": _shown(value) for section, keys in config.items() for key, value in keys.items()}
    with contextlib.suppress(Exception):  # the file is damaged; the configuration as asked for is still known
        resolved: Any = OmegaConf.to_container(patiently(lambda: OmegaConf.load(resolved_path)))
        for section, keys in resolved.items():
            for key, told in keys.items():
                asked, takes = _shown(told["asked"]), _shown(told["takes"])
                settings[f"{section}.{key}"] = takes if asked == takes else f"{asked} → {takes}"
    return settings


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _events(run: RunDirectory, history: History) -> list[Event]:
    starts = [_start(number, start) for number, start in enumerate(run.starts()) if isinstance(start, dict)]
    recorded = read_events(run.path)
    rewinds = [
        Event(
            "rewind", step, _time_of_rewind(recorded, step), f"rewind to step {step:,}; {samples:,} samples passed over"
        )
        for step, samples in history.jumps
    ]
    ends = _ends(run.path)
    others = [_recorded(event) for event in recorded]
    told = [event for event in others if event is not None and not _is_told(event, ends)]
    return [*starts, *rewinds, *_checkpoints(run, recorded), *ends, *told]


def _checkpoints(run: RunDirectory, recorded: list[dict[str, Any]]) -> list[Event]:
    """Events of the checkpoints: the recorded ones with their seconds, and those on the disk of versions that did not
    record them.
    """
    found = {}
    for checkpoint in run.checkpoints():
        with contextlib.suppress(OSError):  # it has just been removed
            made = patiently(checkpoint.path.stat).st_mtime
            found[checkpoint.step] = Event(
                "checkpoint", checkpoint.step, made, f"checkpoint of step {checkpoint.step:,}"
            )
    for event in recorded:
        if event["event"] == "checkpoint" and isinstance(event.get("step"), int):
            words = f"checkpoint of step {event['step']:,}, written in {event.get('seconds', 0):.1f} s"
            found[event["step"]] = Event("checkpoint", event["step"], event["time"], words)
    return list(found.values())


def _time_of_rewind(recorded: list[dict[str, Any]], step: int) -> float | None:
    times = [event["time"] for event in recorded if event["event"] == "rewind" and event.get("step") == step]
    return times[-1] if times else None


def _recorded(event: dict[str, Any]) -> Event | None:
    """A recorded event for the report; None where another event shows the same."""
    step = event["step"] if isinstance(event.get("step"), int) else None
    if event["event"] == "skipped":
        words = f"no update: loss {event.get('loss')}, gradient norm {event.get('grad_norm')}"
        return Event("skipped", step, event["time"], words)
    if event["event"] == "stage":
        words = (
            f"stage {event.get('number')} begins after step {step or 0:,}: {event.get('seq_len', 0):,} bases per "
            "sequence"
        )
        return Event("stage", step, event["time"], words)
    if event["event"] in ("stalled", "failed"):
        return Event("end", step, event["time"], f"{event['event']}: {event.get('reason')}")
    return None


def _is_told(event: Event, ends: list[Event]) -> bool:
    """Whether a job's own record of its end says the same."""
    return event.kind == "end" and any(abs(end.time - event.time) < _SAME_SECONDS for end in ends)


def _start(number: int, start: dict[str, Any]) -> Event:
    moment = None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        moment = datetime.strptime(start["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    step = start.get("step")
    step = step if isinstance(step, int) else None
    where = f" on {start['host']}" if start.get("host") else ""
    ranks = f", {start['ranks']} ranks" if isinstance(start.get("ranks"), int) and start["ranks"] > 1 else ""
    words = f"restart {number}" if number else "start"
    return Event("start", step, moment, f"{words} after step {step or 0:,}{where}{ranks}")


def _ends(path: Path) -> list[Event]:
    """The recorded end of each attempt of a job; processes that were started by hand record none."""
    events = []
    for folder in listed(path / "logs" / "ends", "*-*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            ends = read_ends(folder)
            cause = first_cause(ends)
            latest = max((end.time for end in ends.values()), default=None)
            if cause is not None:
                kind = cause.kind.value if cause.kind else "failed"
                events.append(Event("end", None, cause.time, f"{kind} on {cause.host}: {cause.message}"))
            elif latest is not None:
                events.append(Event("end", None, latest, "ended by itself"))
    return events


def _state(run: RunDirectory, history: History, events: list[Event], steps: int) -> str:
    step = history.steps
    if step >= steps:
        return "finished"
    if run.is_in_use() or time.time() - patiently(run.metrics_path.stat).st_mtime < _FRESH_SECONDS:
        return "in training"
    timed = sorted((event for event in events if event.time is not None), key=lambda event: event.time)
    failed = bool(timed) and timed[-1].kind == "end" and timed[-1].words != "ended by itself"
    return f"failed: {timed[-1].words}" if failed else f"stopped at step {step:,} of {steps:,}"
