"""What is running: commit and uncommitted changes of the code, packages, host and command."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from caduceus.patience import exists

CODE_VERSION = "code_version.json"
"""A file in a copy of the code: the git commit and uncommitted changes of the original."""
COMMAND = "CADUCEUS_COMMAND"
"""The environment variable by which a launcher passes on the user's command to the processes of its jobs."""


def provenance() -> dict[str, Any]:
    """What is running: time, host, the user's command, code version with uncommitted changes, and package versions."""
    packages = ("caduceus", "torch", "numpy", "numba", "triton", "mamba-ssm", "deepspeed", "webdataset", "wandb")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": users_command(),
        "python": platform.python_version(),
        **code_version(),
        "packages": {name: _version(name) for name in packages},
    }


def users_command() -> str:
    """The command that the user typed to start this process or its launcher, such as `python -m caduceus.train --config
    demo`.
    """
    spec, script = getattr(sys.modules["__main__"], "__spec__", None), sys.argv[0]
    if spec is not None:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = ["python", script] if script.endswith(".py") else [Path(script).name]
    return os.environ.get(COMMAND) or shlex.join([*program, *sys.argv[1:]])


def code_version() -> dict[str, str | None]:
    """Commit and uncommitted changes of the code that runs, which may be a copy of a repository."""
    recorded = Path(__file__).resolve().parents[2] / CODE_VERSION
    if exists(recorded):
        return json.loads(recorded.read_text())
    if _git("ls-files", "--error-unmatch", __file__) is None:  # installed, perhaps inside another repository
        return {"git_commit": None, "git_diff": None}
    return {"git_commit": _git("rev-parse", "HEAD"), "git_diff": _git("diff", "HEAD")}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
