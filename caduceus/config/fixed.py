"""What a run keeps from its first start to its last: the values of the keys that fix something."""

from dataclasses import dataclass
from typing import Any

from caduceus.config.keys import Key
from caduceus.config.run import KEYS, Config


@dataclass(frozen=True)
class Change:
    """A key that fixes the run's samples or numbers, with the value of the run and another one."""

    key: Key
    before: Any
    now: Any


def changes(before: Config, now: Config) -> list[Change]:
    """The keys in which `now` would make another run than `before`, in their order."""
    fixed = [key for key in KEYS.values() if key.fixes in ("order", "numbers")]
    if before.train.stages != now.train.stages:
        fixed.remove(KEYS["train.steps"])  # which follow from the stages
    found = (Change(key, value_of(before, key), value_of(now, key)) for key in fixed)
    return [change for change in found if change.before != change.now]


def order_values(config: Config) -> dict[str, Any]:
    """The keys that fix which samples a run sees, without their section, with their values."""
    values = {key.attribute: value_of(config, key) for key in KEYS.values() if key.fixes == "order"}
    if config.data.mode == "shards":
        del values["stream_key"]  # without effect, and unknown to the positions in older checkpoints
    if not config.data.pack:
        del values["pack"]  # likewise unknown
    return values


def value_of(config: Config, key: Key) -> Any:
    """The value of a key in a configuration."""
    return getattr(getattr(config, key.section), key.attribute)
