"""How long the end of a run waits for W&B: a minute, or an hour where the user asks to send files, which may
be large.
"""

from typing import Any

from caduceus.config import Config

END_SECONDS = 60.0
"""Seconds for the last rows after the trainer has ended, with a server that answers."""
FINISH_SECONDS = 15.0
"""Seconds for the client's own end; it tries again and again where the server fails."""
UPLOAD_SECONDS = 3600.0


def is_early(end: dict[str, Any], trainer: int | None) -> bool:
    """Whether a trainer has ended before its run was complete."""
    return trainer is not None and (end.get("exit") != 0 or bool(end.get("stopped")))


def sends_files(config: Config, early: bool) -> bool:
    """Whether an end sends the model's files. An end before the run is complete does not, as its time is short."""
    return not early and config.wandb.artifact_files and bool({"checkpoints", "exports"} & set(config.wandb.artifacts))


def end_seconds(config: Config, early: bool) -> float:
    """Seconds that an end may wait for everything that is sent."""
    return UPLOAD_SECONDS if sends_files(config, early) else END_SECONDS


def finish_seconds(config: Config, early: bool) -> float:
    """Seconds that an end may wait for the client."""
    return UPLOAD_SECONDS if sends_files(config, early) else FINISH_SECONDS
