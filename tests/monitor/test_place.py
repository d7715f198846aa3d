"""Which of the configuration and W&B's own environment variables says where a run goes."""

from pathlib import Path
from typing import Any

import pytest

from caduceus.config import config_from_dict
from caduceus.errors import UserError
from caduceus.monitor.wandb.place import DEFAULT_PROJECT, Place, place_of

VARIABLES = {
    "WANDB_MODE": ("mode", "offline", "offline"),
    "WANDB_PROJECT": ("project", "genomes", "genomes"),
    "WANDB_ENTITY": ("entity", "lab", "lab"),
    "WANDB_RUN_GROUP": ("group", "sweep", "sweep"),
    "WANDB_TAGS": ("tags", "a, b", ["a", "b"]),
    "WANDB_NOTES": ("notes", "why", "why"),
    "WANDB_JOB_TYPE": ("job_type", "tuning", "tuning"),
}
KEYS: dict[str, Any] = {"mode": "online", "tags": ["own"]}
"""What the configuration says of a key; of others a word."""


def place(environment: dict[str, str], run: dict[str, Any] | None = None, **wandb: Any) -> Place:
    config = config_from_dict({"wandb": wandb, "run": {"dir": "runs/a", **(run or {})}})
    return place_of(config, Path("runs/a"), environment)


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_holds_where_the_configuration_is_silent(variable: str) -> None:
    key, value, expected = VARIABLES[variable]
    found = place({variable: value})
    assert getattr(found, key) == expected and found.from_environment == (variable,)
    assert found.which_won() == [f"{variable} is used, as the configuration does not set this"]
    said = KEYS.get(key, "own")
    found = place({variable: value}, **{key: said})
    assert getattr(found, key) == said and found.from_environment == ()
    assert found.which_won() == [f"{variable} is not used, as the configuration sets wandb.{key}"]
    silent = place({variable: ""})
    assert getattr(silent, key) == getattr(place({}), key) and silent.which_won() == []


def test_names_and_folders_are_the_environments_first() -> None:
    assert place({}, {"name": "mine"}).name == "mine" and place({}).directory == Path("runs/a")
    found = place({"WANDB_NAME": "theirs", "WANDB_DIR": "/scratch"}, {"name": "mine"})
    assert found.name == "theirs" and found.directory == Path("/scratch")
    assert set(found.which_won()) == {
        "WANDB_NAME is used instead of run.name",
        "WANDB_DIR is used instead of the run directory",
    }
    assert place({}).project == DEFAULT_PROJECT


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "auto"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "1", "WANDB_MODE": "online"}, "disabled"),
        ({"WANDB_DISABLED": "false", "WANDB_MODE": "online"}, "online"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": "shared"}, "online"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_modes_of_the_environment(environment: dict[str, str], mode: str) -> None:
    assert place(environment).mode == mode
    decided = place(environment, mode="offline")
    assert decided.mode == "offline" and decided.overruled == tuple(environment)


def test_a_mode_that_wandb_has_not_is_refused() -> None:
    with pytest.raises(UserError, match="WANDB_MODE: choose one of online, offline, disabled; got 'on'"):
        place({"WANDB_MODE": "on"})
