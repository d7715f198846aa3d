"""Jobs of this machine, known by the process id of their controller (launch/local.py)."""

import os
import signal
import subprocess


def is_running(job: str) -> bool:
    command = ["ps", "-o", "args=", "-p", job]
    return "launch.local" in subprocess.run(command, capture_output=True, text=True).stdout


def kill(job: str) -> None:
    """End a job's processes at once."""
    os.kill(int(job), signal.SIGTERM)
