"""A key of the configuration says everything about itself: default, meaning, choices, bounds, and what it fixes."""

import dataclasses
import keyword
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from caduceus.errors import UserError

Fixes = Literal["order", "numbers", "rounding", "nothing"]

FIXES: dict[Fixes, str] = {
    "order": "which samples the run sees. A resumed run keeps it",
    "numbers": "the numbers that the run computes. A resumed run keeps it, unless `run.allow_change` names the key",
    "rounding": "only the last bits of these numbers. It may change at any start",
    "nothing": "none of these numbers. It may change at any start",
}
"""What a key fixes, in words."""


@dataclass(frozen=True)
class Key:
    """One key of a section. Bounds hold for every number of a list; the value None is not checked against them."""

    name: str
    """As users write it: `section.key`."""
    attribute: str
    """The field of the section's dataclass."""
    default: Any
    words: str
    fixes: Fixes
    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def section(self) -> str:
        """The first part of the name."""
        return self.name.partition(".")[0]

    def check(self, value: Any) -> None:
        """Raise `UserError` where the key cannot have this value, whatever the values of other keys."""
        if self.choices and value not in self.choices:
            raise UserError(f"{self.name}: choose one of {self.known()}; got '{value}'")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                self._check_number(number)

    def _check_number(self, number: float) -> None:
        if not math.isfinite(number):
            raise UserError(f"{self.name}: must be a finite number, got {number}")
        too_small = (self.least is not None and number < self.least) or (
            self.above is not None and number <= self.above
        )
        too_large = (self.most is not None and number > self.most) or (self.below is not None and number >= self.below)
        if too_small or too_large:
            raise UserError(f"{self.name}: must be {self.bounds()}, got {number}")

    def known(self) -> str:
        """The choices as users write them, separated by commas."""
        return ", ".join("null" if choice is None else str(choice) for choice in self.choices)

    def bounds(self) -> str:
        """The bounds in words, such as `at least 1`; empty where there are none."""
        if self.least is not None and self.most is not None:
            return f"between {self.least} and {self.most}"
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{how} {bound}" for how, bound in words.items() if bound is not None)


def key(default: Any, words: str, *, fixes: Fixes, choices: tuple[Any, ...] = (), **bounds: float) -> Any:
    """The dataclass field of a key. `bounds`: `least` and `most` are inclusive, `above` and `below` exclusive."""
    metadata = {"words": words, "fixes": fixes, "choices": choices, **bounds}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def keys_of(section: str, cls: type) -> Iterator[Key]:
    """The keys of a section's dataclass, in the order of its fields."""
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        yield Key(f"{section}.{name_of(field.name)}", field.name, default, **field.metadata)


def check_section(section: str, values: Any) -> None:
    """Raise `UserError` for the first key of a section with a value that it cannot have."""
    for described in keys_of(section, type(values)):
        described.check(getattr(values, described.attribute))


def name_of(attribute: str) -> str:
    """The name of the key that an attribute holds. Both names are equal, except for `async`, a keyword of Python."""
    return attribute.removesuffix("_")


def attribute_of(name: str) -> str:
    """The attribute that holds a key of a section."""
    return f"{name}_" if keyword.iskeyword(name) else name
