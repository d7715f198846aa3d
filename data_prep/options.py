"""The options that decide which bytes a species' shards hold."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from caduceus.errors import UserError

STRANDS = ("both", "forward", "random")
TAILS = ("short", "inward", "drop", "pad")
_KIND_WORDS = {int: "a whole number", float: "a number", str: "text"}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGT]i?)?B?", re.IGNORECASE)


@dataclass(frozen=True)
class PlanOptions:
    """How a genome is cut into windows, splits and shards. Each field is the command-line option of the same name."""

    window: int = 1 << 20
    stride: int | None = None
    """Distance between window starts; None is the window."""
    strands: str = "both"
    valid_contigs: tuple[str, ...] = ()
    test_contigs: tuple[str, ...] = ()
    tail: str = "short"
    min_window: int = 1024
    """Shortest window."""
    cut_gaps: int = 10_000
    """Runs of N from this length on separate segments; 0 cuts at none."""
    min_acgt: float = 0.5
    """Smallest share of ACGT among a window's bases."""
    include: str | None = None
    exclude: str | None = None
    shard_bytes: int = 256_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("window", "min_window"):
            _require(self, key, getattr(self, key) >= 1, "at least 1")
        _require(self, "window", self.window < 1 << 32, "less than 4,294,967,296")
        _require(self, "stride", self.stride is None or self.stride >= 1, "at least 1")
        _require(self, "cut_gaps", self.cut_gaps >= 0, "0 or more")
        _require(self, "min_acgt", 0 <= self.min_acgt <= 1, "between 0 and 1")
        _require(self, "shard_bytes", self.shard_bytes >= 1 << 16, "at least 64KiB")
        _require(self, "seed", 0 <= self.seed < 1 << 63, "0 or more and less than 2^63")
        _require(self, "strands", self.strands in STRANDS, " or ".join(STRANDS))
        _require(self, "tail", self.tail in TAILS, " or ".join(TAILS))
        _require(
            self, "min_window", self.min_window <= self.window, f"at most the window, which is {self.window:,} bases"
        )
        for key in ("include", "exclude"):
            try:
                re.compile(getattr(self, key) or "")
            except re.error as error:
                raise UserError(f"{option_name(key)}: '{getattr(self, key)}' is not a pattern ({error})") from None
        both = sorted(set(self.valid_contigs) & set(self.test_contigs))
        if both:
            raise UserError(f"--valid-contigs and --test-contigs both name {', '.join(both)}; choose one split")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "PlanOptions":
        """Options from a command line or a YAML file; those that are absent keep their defaults.

        A window below the default shortest window lowers that. Sizes may be written as `256MB`.
        """
        known = {field.name: field for field in fields(cls)}
        converted: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise UserError(f"'{key}' is not an option; choose among {', '.join(known)}")
            converted[key] = _convert(key, value, known[key].default)
        if "min_window" not in converted:
            converted["min_window"] = min(cls.min_window, converted.get("window", cls.window))
        return cls(**converted)

    @property
    def step(self) -> int:
        """Distance between window starts, in bases."""
        return self.stride or self.window

    def as_plan(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def option_name(key: str) -> str:
    return "--" + key.replace("_", "-")


def parse_size(text: str) -> int:
    """Bytes of `256MB` (decimal), `64KiB` (binary) or a plain number."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UserError(f"'{text}' is not a size; write it like 256MB, 64KiB or 1000000")
    number, unit = float(match[1]), (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(number * base ** " kmgt".index(unit[:1] or " "))


def _convert(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        names = [value] if isinstance(value, str | int) else value
        if not isinstance(names, list | tuple):
            raise UserError(f"{option_name(key)}: must be a list of contigs, got {value!r}")
        return tuple(str(name) for name in names)
    if key == "shard_bytes":
        return parse_size(str(value))
    kind = int if key == "stride" else str if key in ("include", "exclude") else type(default)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{option_name(key)}: must be {_KIND_WORDS[kind]}, got {value!r}")
    return value


def _require(options: PlanOptions, key: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{option_name(key)}: must be {rule}, got {getattr(options, key)}")
