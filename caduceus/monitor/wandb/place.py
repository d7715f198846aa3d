"""Where the rows of a run go in W&B: the configuration decides, then W&B's own environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from caduceus.config import Config
from caduceus.errors import UserError

DEFAULT_PROJECT = "caduceus"
_OFF = ("disabled", "dryrun", "offline", "online", "run", "shared")


@dataclass(frozen=True)
class Place:
    """Mode, project and so on of a W&B run. None means W&B's own default."""

    mode: str
    """auto, online, offline or disabled."""
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    name: str | None
    notes: str | None
    job_type: str | None
    directory: Path
    """The folder in which W&B's client makes its own folder `wandb`."""
    from_environment: tuple[str, ...] = ()
    """The names of the environment variables that decided something."""


def place_of(config: Config, run: Path, environment: Mapping[str, str] = os.environ) -> Place:
    """Where the run goes. W&B's environment variables decide keys that are null or auto."""
    used = []

    def either(value: str | None, variable: str) -> str | None:
        if value is None and environment.get(variable):
            used.append(variable)
            return environment[variable]
        return value

    wandb = config.wandb
    mode = wandb.mode
    if mode == "auto":
        mode = _mode(environment, used)
    tags = wandb.tags
    if not tags and environment.get("WANDB_TAGS"):
        used.append("WANDB_TAGS")
        tags = [tag.strip() for tag in environment["WANDB_TAGS"].split(",") if tag.strip()]
    folder = either(None, "WANDB_DIR")
    return Place(
        mode=mode,
        project=either(wandb.project, "WANDB_PROJECT") or DEFAULT_PROJECT,
        entity=either(wandb.entity, "WANDB_ENTITY"),
        group=either(wandb.group, "WANDB_RUN_GROUP"),
        tags=list(tags),
        name=either(None, "WANDB_NAME") or config.run.name,
        notes=either(wandb.notes, "WANDB_NOTES"),
        job_type=either(wandb.job_type, "WANDB_JOB_TYPE"),
        directory=Path(folder) if folder else run,
        from_environment=tuple(used),
    )


def _mode(environment: Mapping[str, str], used: list[str]) -> str:
    if environment.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on", "t"):
        used.append("WANDB_DISABLED")
        return "disabled"
    mode = environment.get("WANDB_MODE", "")
    if not mode:
        return "auto"
    used.append("WANDB_MODE")
    if mode not in _OFF:
        raise UserError(f"WANDB_MODE: choose one of online, offline, disabled; got '{mode}'")
    return {"dryrun": "offline", "run": "online", "shared": "online"}.get(mode, mode)
