"""What the installed DeepSpeed takes in its JSON, asked of DeepSpeed itself: its parser and its pydantic models."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, get_args

from caduceus.errors import UserError

_BATCH = {"train_micro_batch_size_per_gpu": 1}
"""The least that DeepSpeed's parser wants to be told."""
_BATCH_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "data_parallel_size",
)
"""Keys that the run's configuration decides, and that DeepSpeed takes together only."""
_UNCHECKED = {"activation_checkpointing": "activation_checkpointing_config", "flops_profiler": "flops_profiler_config"}
"""Sections of which DeepSpeed reads what it knows and leaves the rest, and where its parsed form has them."""
_UNTYPED = ("checkpoint", "data_types", "torch_autocast")
"""Sections of the same kind whose parsed form is no object of its own."""
_KINDS = {"steps_per_print": 10}
"""Keys of which DeepSpeed's own default does not tell what it takes, with a value of that kind."""
REMARKS = ("_", "//", "#", "comment")
"""Beginnings of keys that say something to people, where DeepSpeed leaves keys that it does not know."""


def import_deepspeed(device_type: str) -> ModuleType:
    """The package, told which device to use, quiet, and with no kernel of its own to be compiled.

    Raises `ImportError` where it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", "0")  # one process may have been started without a launcher
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names that it calls
    # On CPU it would compile collectives of its own at the first start, which needs a compiler; gloo has them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def need_deepspeed(device_type: str) -> ModuleType:
    """The package; raises `UserError` where it is not installed."""
    try:
        return import_deepspeed(device_type)
    except ImportError:
        raise UserError(
            "parallel.strategy: deepspeed is not installed; DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
        ) from None


def refuse_what_deepspeed_would(options: dict[str, Any], path: str, device: str) -> None:
    """Raise `UserError` for the first key of `path` that DeepSpeed does not know, or whose value it does not take.

    `device`: `run.device`. Without DeepSpeed, as where a job is only submitted from, nothing is checked.
    """
    try:
        with _environment_kept():
            import_deepspeed(_device_type(device))
    except ImportError:
        return
    with _quiet():
        parsed, known = _parse({})
        for key, value in options.items():
            if key in _BATCH_KEYS:
                continue
            problem = _problem_of_section(key, value, parsed, known)
            if problem:
                raise UserError(f"parallel.deepspeed_config: {path} sets {problem}")
        rest = {key: value for key, value in options.items() if key not in _BATCH_KEYS}
        if problem := _refusal(rest):
            raise UserError(f"parallel.deepspeed_config: {path}: DeepSpeed refuses it: {_one_line(problem)}")


@contextmanager
def naming_its_file(path: str | None) -> Iterator[None]:
    """Of what DeepSpeed complains about within, make a `UserError` that names the file it was given, if any."""
    try:
        yield
    except (UserError, RuntimeError, OSError, MemoryError):  # memory, devices and networks are no matter of the file
        raise
    except Exception as error:  # of many kinds, assertions among them
        if path is None:
            raise
        raise UserError(
            f"parallel.deepspeed_config: DeepSpeed does not start with {path}: {type(error).__name__}: "
            f"{_one_line(error)}"
        ) from error


def _problem_of_section(key: str, value: Any, parsed: Any, known: set[str]) -> str | None:
    """What is wrong with a top-level key, as the end of a sentence; None for nothing."""
    error = _refusal({key: value})
    if error is not None:
        return _explain(key, value, error)
    if key not in known:
        return f"{key}, which DeepSpeed {_version()} does not know; known here: {', '.join(sorted(known))}"
    if key in _UNCHECKED:
        return _problem_of_unchecked(key, value, vars(getattr(parsed, _UNCHECKED[key])))
    if key in _UNTYPED:
        asked = _Asked(value)
        _parse({key: asked})
        return _problem_of_unchecked(key, value, dict.fromkeys(asked.keys_asked))
    default = _KINDS.get(key, getattr(parsed, key, None))
    return None if _same_kind(default, value) else f"{key} to {json.dumps(value)}; it takes {_kind(default)}"


def _problem_of_unchecked(section: str, values: Any, defaults: dict[str, Any]) -> str | None:
    for key, value in values.items() if isinstance(values, dict) else ():
        if key not in defaults and not key.startswith(REMARKS):
            return _unknown(f"{section}.{key}", defaults)
        if not _same_kind(defaults.get(key), value):
            return f"{section}.{key} to {json.dumps(value)}; it takes {_kind(defaults[key])}"
    return None if isinstance(values, dict) else f"{section} to {json.dumps(values)}; it takes an object"


def _explain(section: str, value: Any, error: Exception) -> str:
    """The first complaint of DeepSpeed's about a section, with the key in it."""
    if not hasattr(error, "errors"):  # not pydantic's
        if isinstance(error, (TypeError, AttributeError)) and not isinstance(value, dict):
            return f"{section} to {json.dumps(value)}, which is of a type that DeepSpeed does not take there"
        return f"{section} to {json.dumps(value)}: {_one_line(error)}"
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    place = place[1:] if place and place[0] == section else place  # some models hold several sections
    name = ".".join([section, *_path(value, place)])
    if first["type"] == "extra_forbidden":
        return _unknown(name, _fields(error.title, first["loc"][:-1]))
    return f"{name} to {json.dumps(first['input'], default=str)}: {first['msg']}"


def _unknown(name: str, known: Any) -> str:
    holder = name.rpartition(".")[0]
    return f"{name}, which DeepSpeed {_version()} does not know; {holder} takes {', '.join(sorted(known))}"


def _path(value: Any, place: list[str]) -> list[str]:
    """Where in a section `place` lies: DeepSpeed may have handed only a part of it to the model that complains."""
    if not place or not isinstance(value, dict) or place[0] in value:
        return place
    for key, part in value.items():
        if isinstance(part, dict) and place[0] in part:
            return [key, *place]
    return place


def _fields(model_name: str, place: tuple[Any, ...]) -> list[str]:
    """Names that a model of DeepSpeed's takes, or the model of its field at `place`; deprecated ones left out."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    model = next(model for model in DeepSpeedConfigModel.__subclasses__() if model.__name__ == model_name)
    for part in place:
        annotation = model.model_fields[part].annotation
        model = next(
            kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")
        )  # an optional one is a union
    return [
        field.alias or name
        for name, field in model.model_fields.items()
        if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated"))
    ]


def _same_kind(default: Any, value: Any) -> bool:
    """Whether a value may stand where DeepSpeed, which does not look at it, has a default of that kind."""
    if default is None or value is None or not isinstance(default, (bool, int, float, str)):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, str) == isinstance(default, str) and isinstance(value, (int, float, str))


def _kind(default: Any) -> str:
    return "true or false" if isinstance(default, bool) else "a string" if isinstance(default, str) else "a number"


def _parse(options: dict[str, Any]) -> tuple[Any, set[str]]:
    """DeepSpeed's parsed form of options, and the top-level keys that its parser looks for."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = _Asked({**options, **_BATCH})
    return DeepSpeedConfig(asked), asked.keys_asked


def _refusal(options: dict[str, Any]) -> Exception | None:
    try:
        _parse(options)
    except Exception as error:  # of many kinds, assertions among them; all are about the options
        return error
    return None


class _Asked(dict):
    """A dict that remembers for which keys it was asked; so do its copies."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> "_Asked":
        return self

    def __copy__(self) -> "_Asked":
        copied = _Asked(dict(self.items()))
        copied.keys_asked = self.keys_asked
        return copied


def _device_type(device: str) -> str:
    """What `run.device` will turn out to be on this machine."""
    import torch

    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def _environment_kept() -> Iterator[None]:
    """The launcher hands its environment on to jobs, which run on other machines."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DeepSpeed's remarks on the parts of a file, which it makes again on the whole."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _version() -> str:
    import deepspeed

    return deepspeed.__version__.partition("+")[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
