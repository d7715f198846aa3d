"""Shards -> batches. `shards` and `order` import no torch; the loader does, so its names load on first use."""

from typing import Any

__all__ = ["ShardedGenome", "build_loader"]


def __getattr__(name: str) -> Any:
    if name == "ShardedGenome":
        from caduceus.data.shards import ShardedGenome

        return ShardedGenome
    if name == "build_loader":
        from caduceus.data.loader import build_loader

        return build_loader
    raise AttributeError(f"module 'caduceus.data' has no attribute {name!r}")
