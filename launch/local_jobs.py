"""Jobs of this machine, identified by the process id of their controller (launch/local.py)."""

import os
import signal
import subprocess
from pathlib import Path

from caduceus.patience import exists


def is_running(job: str, logs: Path) -> bool:
    """Whether the controller that writes to `logs` runs; another process may have its number by now."""
    if exists("/proc/self"):
        try:
            shown = Path(f"/proc/{job}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="surrogateescape")
        except OSError:
            return False
    else:
        command = ["ps", "-ww", "-o", "args=", "-p", job]
        shown = subprocess.run(command, capture_output=True, text=True).stdout
    return f"launch.local {logs}" in shown


def kill(job: str) -> None:
    """End a job's processes at once."""
    os.kill(int(job), signal.SIGTERM)
