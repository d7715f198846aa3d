"""Makes the indexes anew from the tars alone, and the manifest where that is lost too."""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.data.format import index_path
from caduceus.errors import UserError
from caduceus.files import dump_json, sha256_of, write_atomically
from caduceus.patience import exists, is_directory, listed, patiently
from data_prep.check.tar_index import TarContent, read_tar
from data_prep.progress import Progress
from data_prep.write.directory import locked, read_part, write_manifest


def rebuild_index(directory: Path) -> dict[str, Any]:
    """Write the index of every tar of a dataset anew, and its tables; return the manifest.

    A species that has lost its part of the manifest gets one that describes what its tars hold; the genome file and the
    plan stay unknown.
    """
    if not is_directory(directory):
        raise UserError(f"{directory}: no such directory")
    folders = sorted({path.parent for path in listed(directory, "*/*.tar")})
    if not folders:
        raise UserError(f"{directory}: no tar in DIR/SPECIES/; give the directory of a dataset")
    with locked(directory):
        for folder in folders:
            rebuild_species(folder)
        return write_manifest(directory, anew=True)


def rebuild_species(folder: Path) -> None:
    """Rebuild one species' indexes, and its part of the manifest where that is missing."""
    part_path = folder / "species.json"
    part = read_part(part_path) if exists(part_path) else None
    contig_rows: defaultdict[str, int] = defaultdict()
    if part is None:
        contig_rows.default_factory = contig_rows.__len__  # numbered in the order of their first samples
    else:
        contig_rows.update((contig["name"], row) for row, contig in enumerate(part["contigs"]))
    tars = listed(folder, "*.tar")
    contents: dict[Path, TarContent] = {}
    with Progress(f"indexing {folder.name}", sum(patiently(tar.stat).st_size for tar in tars)) as progress:
        for tar in tars:
            try:
                contents[tar] = read_tar(tar, contig_rows)
            except UserError as error:
                raise UserError(f"{error}; restore the tar, or shard the genome again") from None
            progress.add(patiently(tar.stat).st_size)
    if part is not None:
        _require_recorded(folder, part, contents)
    for tar, content in contents.items():
        write_atomically(index_path(tar), content.index.to_bytes())
    if part is None:
        write_atomically(part_path, dump_json(_part_of_tars(folder.name, contig_rows, contents)))


def _require_recorded(folder: Path, part: dict[str, Any], contents: dict[Path, TarContent]) -> None:
    for split in part["splits"].values():
        for shard in split["shards"]:
            tar = folder / shard["name"]
            if tar not in contents:
                raise UserError(f"{tar}: is missing; restore it")
            if hashlib.sha256(contents[tar].index.to_bytes()).hexdigest() != shard["index_sha256"]:
                raise UserError(f"{tar}: is not the tar that {folder / 'species.json'} names; restore it")


def _part_of_tars(species: str, contig_rows: dict[str, int], contents: dict[Path, TarContent]) -> dict[str, Any]:
    first = next(text for content in contents.values() for text in content.descriptions)
    stored = np.concatenate([content.windows for content in contents.values()])
    ends = np.zeros(len(contig_rows), dtype=np.uint64)
    np.maximum.at(ends, stored["contig"], stored["end"])
    splits: dict[str, Any] = {}
    for tar, content in contents.items():
        for text in content.descriptions:
            if (text["species"], text["split"]) != (species, tar.name.split("-")[0]):
                raise UserError(
                    f"{tar}: holds samples of {text['species']}, {text['split']}; move it back to its place"
                )
        row = {
            "name": tar.name,
            "bytes": patiently(tar.stat).st_size,
            "sha256": sha256_of(tar),
            "index_sha256": hashlib.sha256(content.index.to_bytes()).hexdigest(),
            "samples": len(content.index.samples),
            "bases": int(content.index.samples["length"].sum()),
        }
        split = splits.setdefault(content.descriptions[0]["split"], {"samples": 0, "bases": 0, "shards": []})
        split["samples"] += row["samples"]
        split["bases"] += row["bases"]
        split["shards"].append(row)
    return {
        "name": species,
        "weight": 1.0,
        "assembly": first["assembly"],
        "file": None,
        "sha256": None,
        "contigs": [{"name": name, "length": end} for name, end in zip(contig_rows, ends.tolist(), strict=True)],
        "plan": {"strands": _strands(stored)},
        "splits": splits,
        "report": None,
    }


def _strands(stored: np.ndarray) -> str:
    if len(stored) == 2 * len(np.unique(stored[["contig", "start", "end"]])):
        return "both"
    return "random" if stored["strand"].any() else "forward"
