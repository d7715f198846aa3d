"""To which W&B run the rows of a run directory go, and how far: RUN/wandb/run.json and status.json."""

import secrets
import string
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from caduceus.files import dump_json, read_json, write_atomically
from caduceus.patience import is_file

_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class Identity:
    """The W&B run that belongs to a training run."""

    id: str
    url: str | None = None
    former: list[str] = field(default_factory=list)
    """Ids that are no longer used: their W&B run was deleted, or holds undone steps that cannot be removed."""


@dataclass(frozen=True)
class Status:
    """How many of metrics.jsonl's steps W&B has."""

    state: str
    """starting, online, offline, waiting (the server cannot be reached), behind (it ended before all was sent),
    complete.
    """
    step: int = 0
    """Newest step that W&B has, as far as is known."""
    trouble: str | None = None
    url: str | None = None
    time: float = 0.0
    """Seconds since the epoch."""


def directory(run: Path) -> Path:
    return run / "wandb"


def identity(run: Path) -> Identity:
    """The identity of a run directory, which the first call makes and saves there."""
    path = directory(run) / "run.json"
    try:
        return Identity(**(read_json(path) or {}))
    except TypeError:
        return keep_identity(run, Identity(_new_id()))


def adopt(run: Path, wanted: str) -> Identity:
    """Give a run directory the id that its user wants, unless the run no longer uses that id."""
    path = directory(run) / "run.json"
    before = identity(run) if is_file(path) else None
    if before is not None and (before.id == wanted or wanted in before.former):
        return before
    return keep_identity(run, Identity(wanted, former=[] if before is None else [*before.former, before.id]))


def renewed(run: Path) -> Identity:
    """A new id for a run directory whose W&B run cannot be continued."""
    before = identity(run)
    return keep_identity(run, Identity(_new_id(), former=[*before.former, before.id]))


def keep_identity(run: Path, which: Identity) -> Identity:
    directory(run).mkdir(parents=True, exist_ok=True)
    write_atomically(directory(run) / "run.json", dump_json(asdict(which)))
    return which


def keep_url(run: Path, url: str | None) -> None:
    which = identity(run)
    if url and url != which.url:
        keep_identity(run, replace(which, url=url))


def status(run: Path) -> Status | None:
    """The status of a run; None where nothing was ever sent."""
    try:
        return Status(**(read_json(directory(run) / "status.json") or {}))
    except (OSError, TypeError):
        return None


def keep_status(run: Path, now: Status) -> None:
    write_atomically(directory(run) / "status.json", dump_json(asdict(replace(now, time=time.time()))))


def _new_id() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(8))
