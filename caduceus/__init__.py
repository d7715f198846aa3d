"""Pre-training of Caduceus, a bi-directional, reverse-complement-equivariant Mamba language model of DNA.

The package is imported by torch-free tools (sharding, launching), so the names that need torch load on first use.
"""

from typing import TYPE_CHECKING, Any

from caduceus.config import CaduceusConfig

if TYPE_CHECKING:
    from caduceus.model.caduceus import CaduceusForMaskedLM

__all__ = ["CaduceusConfig", "CaduceusForMaskedLM"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "CaduceusForMaskedLM":
        from caduceus.model.caduceus import CaduceusForMaskedLM

        return CaduceusForMaskedLM
    raise AttributeError(f"module 'caduceus' has no attribute {name!r}")
