"""The logs of a job: one file per rank, appended to when the job starts again."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from caduceus.errors import Kind
from caduceus.patience import exists, listed, patiently
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import ends_folder, first_cause, read_ends

_TAIL_BYTES = 1 << 16
_START = "Starting with JobEnvironment"
"""The line that submitit writes when a process of a job starts."""
_KILLED = re.compile(r"srun: error: \S+: tasks? ([\d,-]+): ")


def log_path(logs: Path, job: str, rank: int = 0) -> Path:
    """The log of one rank. The log of rank 0 also has SLURM's own messages."""
    return logs / f"{job}_{rank}_log.out"


def last_error(run: RunDirectory, logs: Path, job: str, restart: int) -> str | None:
    """The line that best explains why an attempt's processes ended; None where there is none.

    It is the message of the rank whose failure ended the others. Where the first process that SLURM saw fail recorded
    no end, because it was killed, it is SLURM's message. An attempt in which no rank recorded an end crashed before
    training began: then it is the last exception in its logs.
    """
    ends = read_ends(ends_folder(run.path, job, restart))
    paths = listed(logs, f"{job}_*_log.out")
    cause = first_cause(ends)
    if cause is None or cause.kind not in (Kind.USER, Kind.NODE):
        for line in (line for path in paths for line in _tail(path).splitlines()):
            if (killed := _KILLED.match(line)) and not _ranks(killed[1]) & ends.keys():
                return line.removeprefix("srun: error: ")
            if killed:
                break
    if cause is not None:
        return cause.message
    exceptions = [line for path in paths for line in _exceptions(_tail(path).splitlines())]
    return exceptions[-1] if exceptions and not ends else None


def follow(path: Path, ended: Callable[[], bool]) -> Iterator[str]:
    """Yield lines of a log as they come, until `ended()`."""
    while not exists(path) and not ended():
        time.sleep(0.1)
    if not exists(path):
        return
    with path.open(errors="replace") as log:
        while True:
            last = ended()
            yield from log
            if last:
                return
            time.sleep(0.2)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, patiently(path.stat).st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return text[max(0, text.rfind(_START)) :]


def _ranks(text: str) -> set[int]:
    """Numbers that srun writes as `0,2-3`."""
    bounds = [part.split("-") for part in text.split(",")]
    return {rank for first, *last in bounds for rank in range(int(first), int((last or [first])[0]) + 1)}


def _exceptions(lines: list[str]) -> Iterator[str]:
    """The lines that end tracebacks, such as `RuntimeError: …`."""
    within = False
    for line in lines:
        if line.startswith("Traceback "):
            within = True
        elif within and line and not line[0].isspace():
            within = False
            yield line
