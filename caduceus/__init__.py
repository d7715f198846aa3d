"""Pre-training of Caduceus, a bi-directional, reverse-complement-equivariant Mamba language model of DNA.

The package is imported by torch-free tools (sharding, launching), so the names that need torch load on first use.
"""

import os
from typing import TYPE_CHECKING, Any

from caduceus.config import CaduceusConfig

# After every operation libgomp lets torch's other threads spin for milliseconds, on cores that the threads of the CPU
# kernels need. libgomp reads how long when torch is imported. About 0.2 ms still bridge the gap to torch's next
# operation.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from caduceus.model.heads import CaduceusForMaskedLM

__all__ = ["CaduceusConfig", "CaduceusForMaskedLM"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "CaduceusForMaskedLM":
        from caduceus.model.heads import CaduceusForMaskedLM

        return CaduceusForMaskedLM
    raise AttributeError(f"module 'caduceus' has no attribute {name!r}")
