"""Loads and saves models: the published layout, folders with a model, and `transformers`' Auto classes.

Importing this package registers Caduceus with `transformers`, where that is installed: see
`caduceus.hub.auto.registration`.
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
