"""Registers Caduceus with `transformers`: its Auto classes then find these models, configurations and tokenizers.

Importing `transformers` takes seconds, which training should not wait for. So where it is not imported yet, each part
is registered when the module of its Auto class is imported.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _register_configuration(auto: ModuleType) -> None:
    from caduceus.hub.auto.configuration_caduceus import CaduceusConfig

    auto.AutoConfig.register(CaduceusConfig.model_type, CaduceusConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from caduceus.hub.auto import modeling_caduceus as models

    for name, model in {
        "AutoModel": models.Caduceus,
        "AutoModelForMaskedLM": models.CaduceusForMaskedLM,
        "AutoModelForSequenceClassification": models.CaduceusForSequenceClassification,
        "AutoModelForTokenClassification": models.CaduceusForTokenClassification,
    }.items():
        getattr(auto, name).register(model.config_class, model, exist_ok=True)


def _register_tokenizer(auto: ModuleType) -> None:
    from caduceus.hub.auto.configuration_caduceus import CaduceusConfig
    from caduceus.hub.auto.tokenization_caduceus import CaduceusTokenizer

    auto.AutoTokenizer.register(CaduceusConfig, slow_tokenizer_class=CaduceusTokenizer, exist_ok=True)


_REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_configuration,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
}


class _Loader(importlib.abc.Loader):
    """Wraps another loader, and registers a part once that has run the module."""

    def __init__(self, loader: Any, register: Callable[[ModuleType], None]) -> None:
        self._loader, self._register = loader, register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._register(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `_REGISTRATIONS` as usual, each once, and lets their loading end with a registration."""

    def __init__(self) -> None:
        self._waiting = dict(_REGISTRATIONS)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        register = self._waiting.pop(name, None)
        spec = register and importlib.machinery.PathFinder.find_spec(name, path, target)
        if register is None or spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, register)
        return spec


def register() -> None:
    """Register parts whose modules are imported, and the others when `transformers` imports them. Without
    `transformers` it does nothing.
    """
    for name, one in _REGISTRATIONS.items():
        if name in sys.modules:
            one(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
