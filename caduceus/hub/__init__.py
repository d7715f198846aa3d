"""Models in and out: the published layout, folders that hold a model, and `transformers`' Auto classes.

Importing this package makes `transformers`, where it is installed, know Caduceus: see `caduceus.hub.auto.registration`.
"""

from caduceus.hub.auto.registration import register
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

register()
