"""The logs of a job: one file per rank, appended to when the job starts again."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_TAIL_BYTES = 1 << 16
_START = "Starting with JobEnvironment"
"""What submitit writes when a process of a job starts."""
_CONSEQUENCE = re.compile(r"another rank failed|[Cc]onnection|gloo|NCCL|DistBackendError|DistNetworkError|Socket")


def log_path(logs: Path, job: str, rank: int = 0) -> Path:
    """The log of one rank. Rank 0's has what SLURM itself says, too."""
    return logs / f"{job}_{rank}_log.out"


def last_error(logs: Path, job: str) -> str | None:
    """The line that best says why a job's processes ended, from their newest start on; None where nothing does.

    A user's mistake first, then an exception, then what SLURM says of a killed process; last what other ranks say of
    the one that they lost.
    """
    mistakes, exceptions, killed, consequences = [], [], [], []
    for path in sorted(logs.glob(f"{job}_*_log.out")):
        lines = _tail(path).splitlines()
        for line in lines:
            if line.startswith("error: "):
                (consequences if _CONSEQUENCE.match(line.removeprefix("error: ")) else mistakes).append(line)
        killed += [line for line in lines if line.startswith("srun: error: ") and "Terminating" not in line]
        for line in _exceptions(lines):
            (consequences if _CONSEQUENCE.search(line) else exceptions).append(line)
    found = mistakes[-1:] or exceptions[-1:] or killed[:1] or consequences[-1:]
    return found[0].removeprefix("error: ").removeprefix("srun: error: ") if found else None


def follow(path: Path, ended: Callable[[], bool]) -> Iterator[str]:
    """Lines of a log as they come, until `ended`."""
    while not path.exists() and not ended():
        time.sleep(0.1)
    if not path.exists():
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
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return text[max(0, text.rfind(_START)) :]


def _exceptions(lines: list[str]) -> Iterator[str]:
    """The lines that end tracebacks, such as `RuntimeError: …`."""
    within = False
    for line in lines:
        if line.startswith("Traceback "):
            within = True
        elif within and line and not line[0].isspace():
            within = False
            yield line
