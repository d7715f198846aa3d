"""The names of the commands, as they are called here. Imports no torch."""

import sys
from pathlib import Path

COMMANDS = {
    "caduceus-fetch": "python data_prep/fetch_genome.py",
    "caduceus-shard": "python data_prep/shard_genome.py",
    "caduceus-train": "python -m caduceus.train",
    "caduceus-launch": "python launch/slurm.py",
    "caduceus-launch-shard": "python launch/shard.py",
    "caduceus-launch-evaluate": "python launch/evaluate.py",
    "caduceus-runs": "python launch/runs.py",
    "caduceus-evaluate": "python -m caduceus.evaluate",
    "caduceus-hub": "python -m caduceus.hub",
    "caduceus-monitor": "python -m caduceus.monitor",
}
"""Names that `pip install` puts on the path -> how the same command is called in a clone."""


def command(name: str) -> str:
    """How to call a command here: as in a clone, or by its installed name."""
    in_clone = (Path(__file__).parents[1] / "pyproject.toml").is_file()
    return name if not in_clone and (Path(sys.executable).parent / name).is_file() else COMMANDS[name]


def called_as() -> str | None:
    """The installed name that this process was called by; None where it was called in another way."""
    name = Path(sys.argv[0]).name
    return name if name in COMMANDS else None
