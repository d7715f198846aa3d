"""Where the rows of a run go in W&B: the configuration decides, then W&B's own environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from caduceus.config import Config
from caduceus.errors import UserError

DEFAULT_PROJECT = "caduceus"
_KEYS = {
    "WANDB_DISABLED": "mode",
    "WANDB_MODE": "mode",
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_RUN_GROUP": "group",
    "WANDB_TAGS": "tags",
    "WANDB_NOTES": "notes",
    "WANDB_JOB_TYPE": "job_type",
}
"""The key of the section wandb that decides before a variable does."""
_FIRST = {"WANDB_NAME": "instead of run.name", "WANDB_DIR": "instead of the run directory"}
"""The variables that decide before the configuration does, and before what."""
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
    overruled: tuple[str, ...] = ()
    """The names of those that did not, as the configuration had decided."""

    def which_won(self) -> list[str]:
        """A line for each environment variable that is set: whether it decides, and why."""
        used = [
            f"{name} is used{', as the configuration does not set this' if name in _KEYS else f' {_FIRST[name]}'}"
            for name in self.from_environment
        ]
        return used + [f"{name} is not used, as the configuration sets wandb.{_KEYS[name]}" for name in self.overruled]


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
        overruled=tuple(
            name
            for name, key in _KEYS.items()
            if environment.get(name) and getattr(wandb, key) not in (None, [], "auto")
        ),
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
