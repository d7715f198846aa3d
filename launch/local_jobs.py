"""Jobs of this machine, known by the process id of their controller (launch/local.py)."""

import os
import signal
import subprocess
import time

_ENDING_SECONDS = 10.0


def is_running(job: str) -> bool:
    command = ["ps", "-o", "args=", "-p", job]
    return "launch.local" in subprocess.run(command, capture_output=True, text=True).stdout


def kill(job: str) -> None:
    """End a job's processes at once, and wait until they have ended, so that the run can be started again."""
    os.kill(int(job), signal.SIGTERM)
    deadline = time.monotonic() + _ENDING_SECONDS
    while is_running(job) and time.monotonic() < deadline:
        time.sleep(0.1)
