"""The registry of genomes: YAML files in configs/genome/ that say where a genome comes from and how it is split.

A file holds the keys of `GenomeSpec`. (Files with a list `species` there describe datasets of several species.)
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from caduceus.errors import UserError
from caduceus.patience import is_file, patiently
from caduceus.presets import CONFIGS
from data_prep.argument_types import is_url
from data_prep.genome.reader import FORMATS
from data_prep.plan.aliases import read_aliases

REGISTRY = CONFIGS / "genome"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class GenomeSpec:
    """One genome as a source of windows.

    `include` and `exclude` are regular expressions that match whole contig names. `contigs` are the main contigs; where
    `include` is absent, these alone are used. Names may be of any column of the alias table.
    """

    name: str
    """Species name in the dataset: letters, digits, _ and -."""
    organism: str = ""
    assembly: str = ""
    fasta: Path | None = None
    """A local file, which is used instead of `urls`; a relative path starts at the YAML file's folder."""
    urls: tuple[str, ...] = ()
    """Where to download the file from; they are tried in turn."""
    md5: str | None = None
    sha256: str | None = None
    contigs: tuple[str, ...] = ()
    include: str | None = None
    exclude: str | None = None
    valid_contigs: tuple[str, ...] = ()
    test_contigs: tuple[str, ...] = ()
    aliases: Path | None = None
    """A tab-separated table with one contig per row and one naming scheme per column; the first line, after `#`, has
    the headings.
    """
    blacklist: str | None = None
    """Path or URL of a BED file of regions to leave out."""
    intervals: str | None = None
    """Path or URL of a BED file (contig, start, end, split) that publications train on."""

    def alias_groups(self) -> list[tuple[str, ...]]:
        """Groups of names that mean the same contig; empty where there is no table."""
        if self.aliases is None:
            return []
        return [names for _, names in read_aliases(self.aliases).rows()]

    def include_pattern(self) -> str | None:
        """The pattern of contigs to use: `include`, or else the main contigs under any of their names."""
        if self.include is not None or not self.contigs:
            return self.include
        names = dict.fromkeys(self.contigs)
        for group in self.alias_groups():
            if names.keys() & set(group):
                names |= dict.fromkeys(group)
        return "|".join(map(re.escape, names))


def registry_names() -> list[str]:
    """Names that `resolve_genome` knows."""
    return sorted(path.stem for path in REGISTRY.glob("*.yaml") if "species" not in _read(path, resolve=False))


def resolve_genome(name: str) -> GenomeSpec:
    """A genome by its registry name, or by the path of a YAML file of the same form."""
    path = _find(name)
    values = _read(path)
    if "species" in values:
        raise UserError(f"{path}: holds a list of species; give it to --genomes instead of --genome")
    types = {field.name: field.type for field in dataclasses.fields(GenomeSpec)}
    unknown = next((key for key in values if key not in types), None)
    if unknown is not None:
        raise UserError(f"{path}: unknown key '{unknown}'; known are {', '.join(types)}")
    if "name" not in values:
        raise UserError(f"{path}: a genome without a name; add the key name")
    spec = GenomeSpec(**{k: _convert(k, value, types[k], path) for k, value in values.items() if value is not None})
    _check(spec, path)
    return spec


def _find(name: str) -> Path:
    if is_url(name):
        raise UserError(
            f"{name}: is an address; give the name of a genome, or a YAML file on this computer that describes one"
        )
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if "/" in name or is_file(name):
        raise UserError(
            f"{name}: is neither a name of the registry nor a YAML file; a genome's file on this computer, {FORMATS}, "
            "needs no download and goes to --fasta of shard_genome.py"
        )
    path = REGISTRY / f"{name}.yaml"
    if not is_file(path):
        raise UserError(f"'{name}' is not a genome of the registry; known are {', '.join(registry_names())}")
    return path


def _read(path: Path, *, resolve: bool = True) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(patiently(lambda: OmegaConf.load(path)), resolve=resolve)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # YAML syntax, unset environment variables, unreadable files: each its own class
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold the keys of a genome")
    return values


def _convert(key: str, value: Any, kind: Any, path: Path) -> Any:
    scalar = isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind == tuple[str, ...] and (isinstance(value, list) or scalar):
        return tuple(str(item) for item in (value if isinstance(value, list) else [value]))
    if kind == Path | None and isinstance(value, str):
        if is_url(value):
            raise UserError(
                f"{path}: key '{key}' takes a local file, got {value}; the genome's address goes into 'urls'"
            )
        return path.parent / Path(value).expanduser()
    if kind in (str, str | None) and scalar:
        return str(value)
    raise UserError(f"{path}: key '{key}' cannot have the value {value!r}")


def _check(spec: GenomeSpec, path: Path) -> None:
    if not _PLAIN_NAME.fullmatch(spec.name):
        raise UserError(f"{path}: name '{spec.name}' may hold letters, digits, _ and - only")
    if spec.fasta is None and not spec.urls:
        raise UserError(f"{path}: '{spec.name}' needs one of the keys fasta, urls")
    for key in ("include", "exclude"):
        try:
            re.compile(getattr(spec, key) or "")
        except re.error as error:
            raise UserError(f"{path}: key '{key}' is not a regular expression ({error})") from None
    both = sorted(set(spec.valid_contigs) & set(spec.test_contigs))
    if both:
        raise UserError(f"{path}: '{spec.name}' has {both[0]} in valid_contigs and in test_contigs; choose one")
