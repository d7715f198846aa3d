"""Models in and out: the published layout, and folders that hold a model. `python -m caduceus.hub export|import`."""

from caduceus.hub.checkpoint import load_published
from caduceus.hub.folders import load, save_imported, save_published
from caduceus.hub.published import from_published, hidden_states_to_published, to_published

__all__ = [
    "from_published",
    "hidden_states_to_published",
    "load",
    "load_published",
    "save_imported",
    "save_published",
    "to_published",
]
