"""The configuration of a run: YAML <-> dataclasses, and dotted overrides.

A pretrain YAML includes other files by `defaults: [model/NAME, data/NAME]` (paths under the same configs/ folder). Its
own keys override theirs, and `key.path=value` overrides come last. An unknown key, a wrong type or an impossible
combination raises a `UserError` that names the key. Nothing here imports torch.
"""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caduceus.config.checks import refuse_impossible_values
from caduceus.config.data import DataConfig
from caduceus.config.dial import DIAL, turned
from caduceus.config.keys import attribute_of, name_of
from caduceus.config.run import SECTIONS, Config
from caduceus.config.stages import steps_of_stages, with_stages
from caduceus.config.train import TrainConfig
from caduceus.errors import UserError
from caduceus.files import dump_json, write_atomically
from caduceus.patience import is_file, patiently
from caduceus.presets import preset

ALLOWED = "allowed_commands.json"
"""A file beside the configuration of a run: the addresses whose commands its user has allowed to run."""


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file or preset with its `defaults`, apply `key.path=value` overrides, and check the result.

    Raises `UserError` naming the file or key for anything that is not a valid configuration.
    """
    path = preset("pretrain", path)
    typed = [_parse_override(override) for override in overrides]
    config = _merge(_with_dial(_read_layers(path), typed))
    if _commands_are_typed(config.data, [values for _, values in typed]) or _commands_are_remembered(config.data, path):
        config.data.allow_commands = True
    if config.run.name is None:
        config.run.name = path.stem
    if config.run.dir is None:
        config.run.dir = f"runs/{config.run.name}"
    return config


def has_dial(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> bool:
    """Whether a file, one that it includes, or an override names a `size` or `compute`, which decide other keys."""
    layers = [*_read_layers(preset("pretrain", path)), *map(_parse_override, overrides)]
    return any(name in values for _, values in layers for name in DIAL)


def config_from_dict(values: dict[str, Any]) -> Config:
    """A checked configuration from plain nested values, as `config_to_dict` gives them."""
    return _merge([("configuration", OmegaConf.create(values))])


def overridden(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """A copy of a configuration with `key.path=value` overrides, checked."""
    typed = [_parse_override(override) for override in overrides]
    return _merge([("configuration", OmegaConf.create(config_to_dict(config))), *typed])


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dicts and lists, every key present."""
    values: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return {section: {name_of(name): value for name, value in keys.items()} for section, keys in values.items()}


def save_config(config: Config, path: str | Path) -> None:
    """Write a configuration as YAML, from which `load_config` reads it back.

    The permission to run commands is written to a file beside it, so that another user who copies the configuration has
    to give it again.
    """
    values = config_to_dict(config)
    if config.data.allow_commands and any(_may_run(address) for address in _addresses(config.data).values()):
        values["data"]["allow_commands"] = False
        write_atomically(Path(path).with_name(ALLOWED), dump_json(_addresses(config.data)))
    write_atomically(path, OmegaConf.to_yaml(values).encode())


def _with_dial(layers: list[tuple[str, DictConfig]], typed: list[tuple[str, DictConfig]]) -> list:
    """All layers; where one names a `size` or `compute`, the keys that follow from it come before the typed ones."""
    dial: dict[str, Any] = {}
    for _, values in layers:
        found = {name: values.pop(name) for name in DIAL if name in values}
        dial = found or dial
    wanted = {name: values.pop(name) for _, values in typed for name in DIAL if name in values}
    dial = wanted or dial
    if not dial:
        return [*layers, *typed]
    lengths = [values.data.seq_len for _, values in (*layers, *typed) if "seq_len" in (values.get("data") or {})]
    keys = turned(dial.get("size"), dial.get("compute"), lengths[-1] if lengths else DataConfig.seq_len)
    return [*layers, ("size", OmegaConf.create(keys)), *typed]


def _read_layers(path: Path, including: tuple[Path, ...] = ()) -> list[tuple[str, DictConfig]]:
    """The layers of a file as (origin, values): first those of its `defaults`, last its own keys."""
    if path.resolve() in including:
        raise UserError(f"{path}: 'defaults' include each other in a circle")
    try:
        values = patiently(lambda: OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no configuration file and no preset of this name; --config list shows the presets"
        ) from None
    except Exception as error:
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(values, DictConfig):
        raise UserError(
            f"{path}: a configuration is a mapping of sections, such as 'train:' with 'steps: 1000' below it"
        )
    layers = []
    for name in values.pop("defaults", None) or []:
        included = path.parent.parent / f"{name}.yaml"
        if not is_file(included):
            raise UserError(f"{path}: 'defaults' names '{name}', but there is no file {included}")
        layers += _read_layers(included, (*including, path.resolve()))
    return [*layers, (str(path), values)]


def _parse_override(override: str) -> tuple[str, DictConfig]:
    key, equals, _ = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"'{override}': expected an override of the form key.path=value, such as train.lr=1e-3")
    try:
        return f"'{override}'", OmegaConf.from_dotlist([override])
    except Exception as error:
        raise UserError(f"'{override}': {_one_line(error)}") from None


def _commands_are_typed(data: DataConfig, typed: list[DictConfig]) -> bool:
    """Whether every address in `data.path` and `data.valid_path` that might run a command was typed on the command
    line.
    """
    keys = {key for values in typed for key in (values.get("data") or {})}
    suspects = {key for key, address in _addresses(data).items() if _may_run(address)}
    return any("pipe:" in str(getattr(data, key)) for key in suspects) and suspects <= keys


def _commands_are_remembered(data: DataConfig, path: Path) -> bool:
    """Whether this user has allowed the commands of the run's configuration at `path`."""
    allowed = path.with_name(ALLOWED)
    try:
        return patiently(allowed.stat).st_uid == os.getuid() and json.loads(allowed.read_text()) == _addresses(data)
    except (OSError, ValueError):
        return False


def _addresses(data: DataConfig) -> dict[str, Any]:
    return {"path": data.path, "valid_path": data.valid_path}


def _may_run(address: Any) -> bool:
    return any(sign in str(address) for sign in ("pipe:", "{", "::"))  # the latter two may hide the first


def _merge(layers: list[tuple[str, DictConfig]]) -> Config:
    merged = OmegaConf.structured(Config)
    for origin, values in layers:
        _refuse_unknown_keys(merged, values, origin)
        values = with_stages(merged, values, origin)
        try:
            merged = OmegaConf.merge(merged, _attributes(values))
        except OmegaConfBaseException as error:
            raise UserError(f"{origin}: {name_of(error.full_key or 'value')}: {_one_line(error)}") from None
    try:
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from None
    if config.train.stages:
        _count_steps(config.train)
    refuse_impossible_values(config)
    return config


def _count_steps(train: TrainConfig) -> None:
    """Set `train.steps` of a run with stages to the sum of their steps."""
    steps = steps_of_stages(train)
    if train.steps not in (TrainConfig.steps, steps):
        raise UserError(
            f"train.steps: {train.steps}, but the stages of train.stages have {steps} together; change the stages, as "
            "train.stages.1.steps=1000, and leave train.steps out"
        )
    train.steps = steps


def _refuse_unknown_keys(known: DictConfig, values: DictConfig, origin: str, prefix: str = "") -> None:
    for key in map(str, values):
        names = list(map(name_of, map(str, known)))
        if key not in names:
            raise UserError(f"{origin}: unknown key '{prefix}{key}'; known here: {', '.join(names)}")
        if OmegaConf.is_dict(known[attribute_of(key)]):
            if not prefix and key not in SECTIONS:  # evaluations, whose names are the user's
                if not OmegaConf.is_dict(values[key]):
                    raise UserError(f"{origin}: {key}: expected a mapping of names, such as 'clinvar: {{verb: …}}'")
                continue
            if not OmegaConf.is_dict(values[key]):
                inner = ", ".join(map(name_of, known[key]))
                raise UserError(f"{origin}: {prefix}{key}: expected a mapping with keys {inner}")
            _refuse_unknown_keys(known[key], values[key], origin, f"{prefix}{key}.")


def _attributes(values: DictConfig) -> DictConfig:
    """Sections of keys -> sections of attributes."""
    sections = {
        section: {attribute_of(key): value for key, value in keys.items_ex(resolve=False)}
        if OmegaConf.is_dict(keys) and section in SECTIONS
        else keys
        for section, keys in values.items_ex(resolve=False)
    }
    return OmegaConf.create(sections)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
