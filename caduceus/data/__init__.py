"""From shards to batches. Only batches and loaders import torch, so the names are loaded on first use."""

from importlib import import_module
from typing import Any

_HOME = {
    "ShardedGenome": "caduceus.data.genome",
    "Batch": "caduceus.data.batch",
    "build_loader": "caduceus.data.loader",
    "build_validation": "caduceus.data.loader",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'caduceus.data' has no attribute {name!r}")
