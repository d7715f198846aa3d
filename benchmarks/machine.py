"""The name of the machine that a benchmark ran on."""

import platform
from pathlib import Path


def processor() -> str:
    """Number and model of the processors, as in "2 x Intel(R) Xeon(R) Processor"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
