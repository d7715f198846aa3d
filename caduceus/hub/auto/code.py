"""The code that goes into every folder with a model, so that it loads where this package is not installed."""

from importlib import import_module
from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "configuration_caduceus.CaduceusConfig",
    "AutoModel": "modeling_caduceus.Caduceus",
    "AutoModelForMaskedLM": "modeling_caduceus.CaduceusForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_caduceus.CaduceusForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_caduceus.CaduceusForTokenClassification",
}
"""`transformers`' Auto classes -> the modules and classes of this code."""


def code_files() -> dict[str, str]:
    """The files of the code, by name, made from this package; in an export they are the files beside this module."""
    if __name__ == "caduceus.hub.auto.code":
        return import_module("caduceus.hub.remote_code").remote_code()
    beside = (path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")
    return {path.name: path.read_text() for path in beside}
