"""The options that decide which bytes a species' shards hold."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from caduceus.errors import UserError

STRANDS = ("both", "forward", "random")
TAILS = ("short", "inward", "drop", "pad")
INTERVAL_MODES = ("exact", "extend", "tile")
CONTIGS = ("auto", "all", "primary")
_SPLIT_BY_CONTIG = ("valid_contigs", "test_contigs")
_SPLIT_BY_BLOCK = ("split_block", "valid_fraction", "test_fraction")
_OPTIONAL = {"stride": int, "split_block": int, "forbid_leakage": bool, "homology": float}
_OPTIONAL |= dict.fromkeys(("include", "exclude", "aliases", "intervals", "around"), str)
_KIND_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGT]i?)?B?", re.IGNORECASE)


@dataclass(frozen=True)
class PlanOptions:
    """How a genome is cut into windows, splits and shards. Each field is a command-line option of the same name."""

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
    """Runs of N of at least this length separate segments; with 0 none does."""
    min_acgt: float = 0.5
    """Smallest share of ACGT in a window."""
    contigs: str = "auto"
    """auto: all contigs except organelles, viruses, decoys, other versions and unplaced ones; an error where that
    leaves less than half of the bases. Unplaced ones are used where they hold most of the bases. primary: the same, but
    never unplaced ones, and never an error. all: every contig.
    """
    include: str | None = None
    """A pattern of whole names: these contigs are used, whatever `contigs` says."""
    exclude: str | None = None
    aliases: str | None = None
    """A table of contig names, or an NCBI assembly report."""
    intervals: str | None = None
    """A BED file of the regions to use; its fourth column, if any, names the split."""
    interval_mode: str = "tile"
    """tile: rows are cut into windows. exact: a row is a window. extend: a row's end is moved to start + window, and at
    the end of the contig the whole row is moved inward (with the default window this is the rule of the published
    training sets, which crop these windows later). With exact and extend no row may be longer than the window.
    """
    around: str | None = None
    """An annotation (GTF, GFF3): its genes and `flank` bases on either side of each are used."""
    flank: int = 2000
    exclude_bed: tuple[str, ...] = ()
    """BED files of regions to leave out."""
    allow_unknown_contigs: bool = False
    """Pass over rows of tables about contigs, or places on them, that the genome does not have."""
    split_block: int | None = None
    """Contigs are cut into blocks of this many bases, and a hash decides the split of each block."""
    valid_fraction: float = 0.0
    test_fraction: float = 0.0
    forbid_leakage: bool | None = None
    """Remove from train the bases that valid or test hold; None: except with interval_mode extend."""
    homology: float | None = None
    """Leave out of train stretches with at least this share of their k-mers in valid or test, of any species of the
    same command.
    """
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
        _require(self, "contigs", self.contigs in CONTIGS, " or ".join(CONTIGS))
        if self.include is not None and self.contigs != "auto":
            raise UserError(
                f"--contigs {self.contigs}: --include decides which contigs are used; leave one of the two out"
            )
        _require(self, "interval_mode", self.interval_mode in INTERVAL_MODES, " or ".join(INTERVAL_MODES))
        if self.intervals is None and self.interval_mode != "tile":
            raise UserError(f"--interval-mode {self.interval_mode}: needs --intervals, a BED file")
        if self.interval_mode != "tile" and self.stride is not None:
            raise UserError(f"--stride: rows are not tiled with --interval-mode {self.interval_mode}; leave it out")
        _require(self, "flank", self.flank >= 0, "0 or more")
        if self.around is None and self.flank != type(self).flank:
            raise UserError("--flank: goes with the genes of an annotation; give it by --around, or leave --flank out")
        _require(self, "homology", self.homology is None or 0 < self.homology <= 1, "above 0 and at most 1")
        if self.around is not None and self.intervals is not None:
            raise UserError("--around: --intervals decides which regions are used; leave one of the two out")
        self._check_blocks()
        for key in ("include", "exclude"):
            try:
                re.compile(getattr(self, key) or "")
            except re.error as error:
                raise UserError(f"{option_name(key)}: '{getattr(self, key)}' is not a pattern ({error})") from None
        both = sorted(set(self.valid_contigs) & set(self.test_contigs))
        if both:
            raise UserError(f"--valid-contigs and --test-contigs both name {', '.join(both)}; choose one split")

    def _check_blocks(self) -> None:
        for key in ("valid_fraction", "test_fraction"):
            _require(self, key, 0 <= getattr(self, key) <= 1, "between 0 and 1")
        held_out = self.valid_fraction + self.test_fraction
        if self.split_block is None:
            if held_out > 0:
                raise UserError("--valid-fraction and --test-fraction are shares of blocks; give --split-block too")
            return
        _require(self, "split_block", self.split_block >= self.min_window, f"at least {self.min_window:,}")
        if not 0 < held_out <= 1:
            raise UserError("--split-block: give --valid-fraction or --test-fraction, together at most 1")
        if self.valid_contigs or self.test_contigs:
            raise UserError("--split-block: splits are made either by block or by contig; leave one of the two out")
        if self.interval_mode != "tile":
            raise UserError("--split-block: cuts rows at the borders of blocks; use --interval-mode tile")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "PlanOptions":
        """Options from a command line or a YAML file; an absent option, or one of None, has its default.

        A window below the default shortest window lowers that. Sizes may be written as `256MB`. Raises `UserError` for
        impossible values.
        """
        known = {field.name: field for field in fields(cls)}
        converted: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise UserError(f"'{key}' is not an option; choose from {', '.join(known)}")
            if value is not None:
                converted[key] = _convert(key, value, known[key].default)
        if "min_window" not in converted:
            converted["min_window"] = min(cls.min_window, converted.get("window", cls.window))
        return cls(**converted)

    @property
    def step(self) -> int:
        """Distance between window starts, in bases."""
        return self.stride or self.window

    @property
    def leakage_forbidden(self) -> bool:
        """Whether bases that valid or test hold are removed from train."""
        return self.interval_mode != "extend" if self.forbid_leakage is None else self.forbid_leakage

    def as_plan(self) -> dict[str, Any]:
        """Plain values for the manifest. Files are given by name and sha256, so that their folder does not matter."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["allow_unknown_contigs"]  # a permission, which changes no byte
        values["forbid_leakage"] = self.leakage_forbidden
        values["exclude_bed"] = [_describe_file("exclude_bed", path) for path in self.exclude_bed]
        if self.homology is None:  # older datasets have none of these
            del values["homology"]
        if self.around is None:
            del values["around"], values["flank"]
        for key in ("aliases", "intervals", "around"):
            if values.get(key) is not None:
                values[key] = _describe_file(key, values[key])
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def override(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `own` over those of `base`, as plain values.

    Where `own` switches an option off, or replaces it by another way, the options of `base` that go with it are dropped
    too: fractions of blocks without blocks, blocks where `own` splits by contigs (and vice versa), and the mode of
    intervals.
    """
    base = dict(base)

    def drop(*keys: str) -> None:
        for key in keys:
            base.pop(key, None)

    fractions = ("valid_fraction", "test_fraction")
    if any(own.get(key) for key in _SPLIT_BY_CONTIG):
        drop(*_SPLIT_BY_BLOCK)
    if any(own.get(key) for key in _SPLIT_BY_BLOCK):
        drop(*_SPLIT_BY_CONTIG)
    if "split_block" in own and own["split_block"] is None:
        drop(*fractions)
    if any(key in own for key in fractions) and not any({**base, **own}.get(key) for key in fractions):
        drop("split_block", *fractions)
    if "intervals" in own and own["intervals"] is None:
        drop("interval_mode")
    if own.get("include"):
        drop("contigs")
    if own.get("contigs") not in (None, "auto"):
        drop("include")
    return {**base, **own}


def option_name(key: str) -> str:
    return "--" + key.replace("_", "-")


def parse_size(text: str, option: str) -> int:
    """Bytes in an option's text: `256MB` (decimal), `64KiB` (binary) or a plain number."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UserError(f"{option}: '{text}' is not a size; write it like 256MB, 64KiB or 1000000")
    number, unit = float(match[1]), (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(number * base ** " kmgt".index(unit[:1] or " "))


def _describe_file(key: str, path: str) -> dict[str, str]:
    try:
        return {"file": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    except OSError as error:
        raise UserError(f"{option_name(key)}: {path}: cannot be read ({error.strerror})") from None


def _convert(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        names = [value] if isinstance(value, str | int) else value
        if not isinstance(names, list | tuple):
            raise UserError(f"{option_name(key)}: must be a list, got {value!r}")
        return tuple(str(name) for name in names)
    if key == "shard_bytes":
        return parse_size(str(value), option_name(key))
    if key == "contigs" and not isinstance(value, str):
        raise UserError(f"--contigs: must be {' or '.join(CONTIGS)}, got {value!r}; 'include' takes a pattern of names")
    kind = _OPTIONAL.get(key, type(default))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{option_name(key)}: must be {_KIND_WORDS[kind]}, got {value!r}")
    return value


def _require(options: PlanOptions, key: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{option_name(key)}: must be {rule}, got {getattr(options, key)}")
