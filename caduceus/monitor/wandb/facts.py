"""The facts that W&B shows as a run's configuration, shortened where they are too long.

W&B's server refuses a configuration that is too large, and with it the whole run.
"""

import json
import shlex
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from caduceus.config import Config, config_to_dict
from caduceus.monitor.wandb.account import slurm
from caduceus.monitor.wandb.place import Place
from caduceus.run.directory import RunDirectory

MOST_CHARACTERS = 20_000
"""Longest text of a value; W&B limits the sum of all values."""
_TAG_CHARACTERS = 64
"""Longest tag that W&B's client accepts."""


def facts_of(run: RunDirectory, config: Config) -> tuple[dict[str, Any], list[str]]:
    """The configuration and the facts of the newest start, shortened; and the names of the shortened keys.

    `start.auto` has the value of every `auto`.
    """
    starts = run.starts()
    facts = starts[-1] if starts else {}
    facts = {**facts, "starts": len(starts), "slurm": slurm(), "auto": decisions(run)}
    return shortened({**config_to_dict(config), "start": facts})


def decisions(run: RunDirectory) -> dict[str, Any]:
    """The values of the keys in resolved.yaml, by their full names; empty where the file is absent or damaged."""
    try:
        told: Any = OmegaConf.to_container(OmegaConf.load(run.resolved_path))
        return {f"{section}.{key}": one["takes"] for section, keys in told.items() for key, one in keys.items()}
    except Exception:  # the file may be damaged in any way
        return {}


def program_and_arguments(run: RunDirectory) -> tuple[str, list[str]]:
    """Program and arguments of the newest start, as the user typed them: ("-m caduceus.train", ["--config",
    "demo"]).
    """
    starts = run.starts()
    words = shlex.split(starts[-1].get("command", "") if starts else "")
    words = words[1:] if words[:1] == ["python"] else words
    program = words[:2] if words[:1] == ["-m"] else words[:1]
    return " ".join(program), words[len(program) :]


def fitting(place: Place) -> Place:
    """The place, with notes and tags cut to the lengths that W&B accepts."""
    notes = place.notes if place.notes is None else _cut(place.notes)
    return replace(place, notes=notes, tags=[tag[:_TAG_CHARACTERS] for tag in place.tags])


def shortened(facts: dict[str, Any], where: str = "") -> tuple[dict[str, Any], list[str]]:
    """The facts with long texts and lists cut, and the names of the keys that were cut."""
    short: dict[str, Any] = {}
    cut: list[str] = []
    for name, value in facts.items():
        full = f"{where}{name}"
        if isinstance(value, dict):
            short[name], inner = shortened(value, f"{full}.")
            cut += inner
        elif len(text := value if isinstance(value, str) else json.dumps(value, default=str)) > MOST_CHARACTERS:
            short[name] = _cut(text)
            cut.append(full)
        else:
            short[name] = value
    return short, cut


def _cut(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … {len(text):,} characters in all"
