"""The registry of genomes: YAML files in configs/genome/ that say where a genome comes from and how it is split.

A file describes one genome by the keys of `GenomeSpec`, or several species of one dataset:

    weight_exponent: 0.5                 # optional, see GenomeSet
    species:
      - genome: hg38                     # an entry of the registry; further keys override its own
        name: human
        weight: 2
      - name: dog                        # or any file or URL
        assembly: canFam4
        file: genomes/canFam4.fa.gz      # from the YAML file's folder; ${oc.env:SCRATCH} names an environment variable
        exclude: chrUn_.*
        valid_contigs: [chr38]
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from caduceus.errors import UserError

REGISTRY = Path(__file__).resolve().parent.parent / "configs" / "genome"
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
    file: Path | None = None
    """A local file; a relative path starts at the YAML file's folder. Wins over `urls`."""
    urls: tuple[str, ...] = ()
    """Where to download the file from; each is tried in turn."""
    md5: str | None = None
    sha256: str | None = None
    contigs: tuple[str, ...] = ()
    include: str | None = None
    exclude: str | None = None
    valid_contigs: tuple[str, ...] = ()
    test_contigs: tuple[str, ...] = ()
    aliases: Path | None = None
    """Tab-separated table, one contig a row, one naming scheme a column, named by the first line after `#`."""
    blacklist: str | None = None
    """Path or URL of a BED file of regions to leave out."""
    intervals: str | None = None
    """Path or URL of a BED file (contig, start, end, split) that publications train on."""
    weight: float = 1.0
    """Share of this species in a mixture, relative to the others."""

    def alias_groups(self) -> list[tuple[str, ...]]:
        """Names of the same contig, group by group; empty where there is no table."""
        if self.aliases is None:
            return []
        try:
            lines = self.aliases.read_text().splitlines()
        except OSError as error:
            raise UserError(f"{self.aliases}: the alias table cannot be read ({error.strerror})") from None
        rows = (line.split("\t") for line in lines if line.strip() and not line.startswith("#"))
        return [tuple(name for name in row if name) for row in rows]

    def include_pattern(self) -> str | None:
        """The pattern of contigs to use: `include`, or the main contigs under any of their names."""
        if self.include is not None or not self.contigs:
            return self.include
        names = dict.fromkeys(self.contigs)
        for group in self.alias_groups():
            if names.keys() & set(group):
                names |= dict.fromkeys(group)
        return "|".join(map(re.escape, names))


@dataclass(frozen=True)
class GenomeSet:
    """Species of one dataset.

    `weight_exponent`: None takes each weight as given; an exponent a multiplies it by (bases used)^a, so that 1 samples
    in proportion to genome size and 0.5 favours small genomes (temperature 2).
    """

    species: tuple[GenomeSpec, ...]
    weight_exponent: float | None = None


def registry_names() -> list[str]:
    """Names that `resolve_genome` knows."""
    return sorted(path.stem for path in REGISTRY.glob("*.yaml"))


def resolve_genome(name: str) -> GenomeSpec:
    """One genome by its registry name, or by the path of a YAML file of the same form."""
    genomes = load_genomes(_find(name))
    if len(genomes.species) != 1:
        raise UserError(f"{name}: holds {len(genomes.species)} species; give it to --genomes instead of --genome")
    return genomes.species[0]


def load_genomes(path: str | Path) -> GenomeSet:
    """All species of a YAML file; a name of the registry stands for its file."""
    path = _find(str(path))
    values = _read(path)
    if "species" not in values:
        return GenomeSet((_build(values, path),))
    unknown = sorted(values.keys() - {"species", "weight_exponent"})
    if unknown:
        raise UserError(f"{path}: unknown key '{unknown[0]}' beside species; known are weight_exponent and species")
    entries, exponent = values["species"], values.get("weight_exponent")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: species must be a list with one entry of keys for each species")
    if exponent is not None and not isinstance(exponent, int | float):
        raise UserError(f"{path}: weight_exponent must be a number, got {exponent!r}")
    species = tuple(_build(entry, path) for entry in entries)
    names = [spec.name for spec in species]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"{path}: two species are named '{repeated}'; give each its own name")
    return GenomeSet(species, exponent)


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    path = REGISTRY / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"'{name}' is no genome of the registry; known are {', '.join(registry_names())}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # YAML syntax, unset environment variables, unreadable files: each its own class
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold keys of a genome, or a species list")
    return values


def _build(values: dict[str, Any], path: Path) -> GenomeSpec:
    values = dict(values)
    base = values.pop("genome", None)
    if base is None and "name" not in values:
        raise UserError(f"{path}: a genome without a name; add the key name")
    inherited = {} if base is None else dataclasses.asdict(resolve_genome(str(base)))
    if {"file", "urls"} & values.keys():  # another file than the entry's: its checksums say nothing about it
        inherited |= {"file": None, "urls": (), "md5": None, "sha256": None}
    types = {field.name: field.type for field in dataclasses.fields(GenomeSpec)}
    given = {}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{path}: unknown key '{key}'; known are genome, {', '.join(types)}")
        if value is not None:
            given[key] = _convert(key, value, types[key], path)
    spec = GenomeSpec(**{**inherited, **given})
    _check(spec, path)
    return spec


def _convert(key: str, value: Any, kind: Any, path: Path) -> Any:
    scalar = isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind == tuple[str, ...] and (isinstance(value, list) or scalar):
        return tuple(str(item) for item in (value if isinstance(value, list) else [value]))
    if kind == Path | None and isinstance(value, str):
        return path.parent / Path(value).expanduser()
    if kind in (str, str | None) and scalar:
        return str(value)
    raise UserError(f"{path}: key '{key}' cannot be {value!r}")


def _check(spec: GenomeSpec, path: Path) -> None:
    if not _PLAIN_NAME.fullmatch(spec.name):
        raise UserError(f"{path}: name '{spec.name}' may hold letters, digits, _ and - only")
    if spec.file is None and not spec.urls:
        raise UserError(f"{path}: '{spec.name}' needs one of the keys genome, file, urls")
    if not spec.weight > 0:
        raise UserError(f"{path}: '{spec.name}' has weight {spec.weight}; it must be above 0")
    for key in ("include", "exclude"):
        try:
            re.compile(getattr(spec, key) or "")
        except re.error as error:
            raise UserError(f"{path}: key '{key}' is no regular expression ({error})") from None
    both = sorted(set(spec.valid_contigs) & set(spec.test_contigs))
    if both:
        raise UserError(f"{path}: '{spec.name}' has {both[0]} in valid_contigs and in test_contigs; choose one")
