"""The values that a run keeps from its first start to its last: those of the keys that fix something."""

from dataclasses import dataclass
from typing import Any

from caduceus.config.keys import Key
from caduceus.config.run import KEYS, Config

_LATER = {
    *("data.pack", "data.crop_offset", "data.species_weights", "data.mask_span", "data.mask_schedule"),
    "train.batch_ramp",
}
"""Keys that are newer than the data positions in older checkpoints."""


@dataclass(frozen=True)
class Change:
    """A key that fixes the run's samples or numbers, and whose value differs: `before` in the run, `now` in the
    request.
    """

    key: Key
    before: Any
    now: Any


def changes(before: Config, now: Config) -> list[Change]:
    """The keys that fix something and differ between the configurations `before` and `now`, in the order of the
    sections.
    """
    fixed = [key for key in KEYS.values() if key.fixes in ("order", "numbers")]
    if before.train.stages != now.train.stages:
        fixed.remove(KEYS["train.steps"])  # which follow from the stages
    found = (Change(key, value_of(before, key), value_of(now, key)) for key in fixed)
    return [change for change in found if change.before != change.now]


def order_values(config: Config) -> dict[str, Any]:
    """The keys that fix which samples a run sees, without their section, with their values."""
    keys = [key for key in KEYS.values() if key.fixes == "order"]
    values = {key.attribute: value_of(config, key) for key in keys}
    unknown = {key.attribute for key in keys if key.name in _LATER and value_of(config, key) == key.default}
    if config.data.mode == "shards":
        unknown.add("stream_key")  # without effect
    return {name: value for name, value in values.items() if name not in unknown}


def value_of(config: Config, key: Key) -> Any:
    """The value of a key in a configuration."""
    return getattr(getattr(config, key.section), key.attribute)
