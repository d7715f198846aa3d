"""Reads a YAML file of several species, and makes one request per species.

weights: bases^0.5          # given (the default), bases, or a power of the train bases
defaults: {window: 131072}  # options of the plan, for every species
species:
  - genome: hg38            # an entry of the registry; further keys override its own
    name: human
    weight: 2               # multiplies (default 1)
  - name: dog               # or any file
    assembly: canFam4
    fasta: canFam4.fa.gz    # or an address; from this file's folder; ${oc.env:SCRATCH} names an environment variable
    valid_contigs: [chr38]  # any option of the plan
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from caduceus.errors import UserError
from caduceus.patience import patiently
from data_prep.argument_types import is_url
from data_prep.genome.genome import default_cache_dir
from data_prep.plan.options import PlanOptions, override
from data_prep.plan.species import SpeciesRequest
from data_prep.source.download import fetch_cached, fetch_genome
from data_prep.source.registry import GenomeSpec, resolve_genome

REGISTRY_FILE = "registry"
"""The value of --intervals or --exclude-bed that means the registry's file for the genome."""
_KEYS = {"genome", "name", "assembly", "fasta", "weight"}
_WEIGHTS = re.compile(r"bases(?:\^([0-9]*\.?[0-9]+))?")


def read_species_file(path: Path, overrides: Mapping[str, Any], cache_dir: Path | None) -> list[SpeciesRequest]:
    """The requests of a YAML file; `overrides`, the options of the command line, override those of the file."""
    values = _load(path)
    unknown = sorted(values.keys() - {"species", "defaults", "weights"})
    if unknown:
        raise UserError(f"{path}: unknown key '{unknown[0]}'; known are species, defaults, weights")
    entries, defaults = values.get("species"), values.get("defaults") or {}
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: 'species' must be a list of entries with keys, at least one")
    if not isinstance(defaults, dict):
        raise UserError(f"{path}: 'defaults' must hold keys of the plan")
    exponent = _weight_exponent(values.get("weights", "given"), path)
    requests = []
    for number, entry in enumerate(entries):
        try:
            requests.append(_request(entry, defaults, overrides, exponent, path.parent, cache_dir))
        except UserError as error:
            raise UserError(f"{path}: species {entry.get('name', number + 1)}: {error}") from None
    name, times = Counter(request.name for request in requests).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path}: two species are named '{name}'; give each its own name")
    return requests


def request_for_genome(
    spec: GenomeSpec,
    given: Mapping[str, Any],
    *,
    name: str | None = None,
    assembly: str | None = None,
    weight: float = 1.0,
    weight_exponent: float | None = None,
    cache_dir: Path | None = None,
) -> SpeciesRequest:
    """The request for a genome of the registry, which is downloaded if needed; the options `given` override the
    entry's.
    """
    own = {
        "include": spec.include_pattern(),
        "exclude": spec.exclude,
        "valid_contigs": spec.valid_contigs,
        "test_contigs": spec.test_contigs,
        "aliases": str(spec.aliases) if spec.aliases else None,
    }
    values = override({key: value for key, value in own.items() if value}, given)
    if values.get("intervals") == REGISTRY_FILE:
        values |= {"intervals": _registry_file(spec, "intervals"), "valid_contigs": (), "test_contigs": ()}
    options = PlanOptions.from_values(values)
    blacklists = [_registry_file(spec, "blacklist") if path == REGISTRY_FILE else path for path in options.exclude_bed]
    options = fetch_files(replace(options, exclude_bed=tuple(blacklists)), cache_dir)
    fasta = fetch_genome(spec, cache_dir or default_cache_dir())
    return SpeciesRequest(
        name or spec.name, fasta, assembly or spec.assembly, options, weight, weight_exponent, cache_dir
    )


def fetch_files(options: PlanOptions, cache_dir: Path | None) -> PlanOptions:
    """The same options, with addresses replaced by local files, which are downloaded."""
    return replace(
        options,
        aliases=_local(options.aliases, cache_dir),
        intervals=_local(options.intervals, cache_dir),
        around=_local(options.around, cache_dir),
        exclude_bed=tuple(_local(path, cache_dir) for path in options.exclude_bed),
    )


def genome_file(place: str, cache_dir: Path | None) -> Path:
    """The local file of a genome that is given by a path or an address."""
    return Path(_local(place, cache_dir))


def _local(place: str | None, cache_dir: Path | None) -> str | None:
    if place is None or not is_url(place):
        return place
    return str(fetch_cached(place, cache_dir or default_cache_dir()))


def _registry_file(spec: GenomeSpec, key: str) -> str:
    place = getattr(spec, key)
    if place is None:
        raise UserError(f"{spec.name}: the registry knows no {key} for this genome; give a BED file")
    return place


def _request(
    entry: Mapping[str, Any],
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any],
    exponent: float | None,
    folder: Path,
    cache_dir: Path | None,
) -> SpeciesRequest:
    own = {key: value for key, value in entry.items() if key not in _KEYS}
    options = override(_from_folder(override(defaults, own), folder), overrides)
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"'weight' must be a number above 0, got {weight!r}")
    name, assembly, fasta = (_text(entry, key) for key in ("name", "assembly", "fasta"))
    if "genome" in entry:
        if fasta is not None:
            raise UserError("has both 'genome' and 'fasta'; give one")
        spec = resolve_genome(_text(entry, "genome") or "")
        return request_for_genome(
            spec,
            options,
            name=name,
            assembly=assembly,
            weight=float(weight),
            weight_exponent=exponent,
            cache_dir=cache_dir,
        )
    if name is None or fasta is None:
        raise UserError("needs the keys 'name' and 'fasta', or 'genome'")
    plan = fetch_files(PlanOptions.from_values(options), cache_dir)
    path = genome_file(_place(fasta, folder), cache_dir)
    return SpeciesRequest(name, path, assembly or "", plan, float(weight), exponent, cache_dir)


def _from_folder(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The options with relative paths of files resolved from the YAML file's folder."""
    values = dict(options)
    for key in ("aliases", "intervals", "around", "exclude_bed"):
        paths = values.get(key)
        if isinstance(paths, str):
            values[key] = _place(paths, folder)
        elif isinstance(paths, list):
            values[key] = [_place(path, folder) for path in paths]
    return values


def _place(path: Any, folder: Path) -> str:
    return path if path == REGISTRY_FILE or is_url(str(path)) else str(folder / Path(str(path)).expanduser())


def _load(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(patiently(lambda: OmegaConf.load(path)), resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # YAML syntax, unset environment variables, unreadable files: each its own class
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a list 'species'")
    return values


def _text(entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise UserError(f"'{key}' must be text, got {value!r}")
    return None if value is None else str(value)


def _weight_exponent(weights: Any, path: Path) -> float | None:
    if weights == "given":
        return None
    match = _WEIGHTS.fullmatch(str(weights))
    if not match:
        raise UserError(f"{path}: 'weights' must be given, bases or bases^POWER, got {weights!r}")
    return float(match[1] or 1)
