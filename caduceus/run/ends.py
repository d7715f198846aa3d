"""RUN/logs/ends/JOB-RESTART/rank-N.json: how each rank of an attempt ended. Imports no torch.

A rank that left no such file was killed, or never began.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from caduceus.errors import Kind, PeerError, kind_of, one_line
from caduceus.files import dump_json, write_atomically
from caduceus.patience import listed, patient

_recording: tuple[Path, int] | None = None
"""The folder and rank of the `recording_end` block that this process is in."""


@dataclass(frozen=True)
class End:
    """The end of one rank; `kind` is None where it did not fail: its training was complete or was stopped.

    time: seconds since the epoch, by the clock of the rank's own host. peer, peer_kind: the rank whose failure ended
    this one (`Kind.PEER`), where known.
    """

    rank: int
    host: str
    time: float
    kind: Kind | None = None
    message: str | None = None
    peer: int | None = None
    peer_kind: Kind | None = None


def ends_folder(run: Path, job: str, restart: int) -> Path:
    """The folder of the ends of one attempt: the job `job` after `restart` restarts."""
    return run / "logs" / "ends" / f"{job}-{restart}"


@contextlib.contextmanager
def recording_end(folder: Path, rank: int) -> Iterator[None]:
    """A context for the whole work of a rank: it writes the rank's end into `folder`, and lets an exception pass."""
    global _recording
    _recording = folder, rank
    try:
        yield
    except BaseException as error:
        record_end(folder, rank, error)
        raise
    else:
        record_end(folder, rank)
    finally:
        _recording = None


def record_end_here(error: BaseException) -> None:
    """Record the end of this rank now, for a process that will not leave its `recording_end` block; outside of one, do
    nothing.
    """
    if _recording is not None:
        record_end(*_recording, error)


def record_end(folder: Path, rank: int, error: BaseException | None = None) -> None:
    """Record how this rank ends. A failing disk is ignored, as the error that ends the rank is reported anyway."""
    facts: dict[str, Any] = {} if error is None else {"kind": kind_of(error), "message": one_line(error)}
    if isinstance(error, PeerError):
        facts |= {"peer": error.rank, "peer_kind": error.peer_kind}
    end = End(rank, socket.gethostname(), time.time(), **facts)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"rank-{rank}.json", dump_json(asdict(end)))


@patient
def read_ends(folder: Path) -> dict[int, End]:
    """The recorded ends of the ranks of an attempt, by rank."""
    ends = [_end(json.loads(path.read_text())) for path in listed(folder, "rank-*.json")]
    return {end.rank: end for end in sorted(ends, key=lambda end: end.rank)}


def first_cause(ends: dict[int, End]) -> End | None:
    """The end that caused the others: first a user's mistake, then a bad node, then the earliest crash; None if no rank
    failed.
    """
    order = [Kind.USER, Kind.NODE, Kind.CRASH, Kind.RETRY, Kind.PEER]
    failed = [(order.index(end.kind), end.time, end) for end in ends.values() if end.kind is not None]
    return min(failed, key=lambda found: found[:2], default=(0, 0.0, None))[2]


def _end(values: dict) -> End:
    kinds = {name: values[name] and Kind(values[name]) for name in ("kind", "peer_kind")}
    return End(**{**values, **kinds})
