"""Writes the scores of all substitutions of places as bigWig tracks, for genome browsers. Imports no torch."""

from pathlib import Path

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.columns import package
from caduceus.files import sync, temporary_name
from caduceus.patience import is_directory

_ENDING = ".bw"
_ALTERNATIVES = 3


def check_tracks(prefix: str | Path, columns: list[str]) -> None:
    """Raise `UserError` where tracks of these scores, with names that begin with `prefix`, cannot be written."""
    package("pyBigWig")
    if not is_directory(Path(prefix).absolute().parent):
        raise UserError(f"--tracks: {Path(prefix).parent}: there is no such folder")
    if not any(_is_track(name) for name in columns):
        raise UserError("--tracks: needs masked or unmasked scores; add one of them to --scores")


def write_tracks(prefix: str | Path, contigs: dict[str, int], columns: dict[str, np.ndarray]) -> list[Path]:
    """Write PREFIX.entropy.bw, and PREFIX.llr.bw and the like: the mean over the three alternatives of each place.

    columns: those of the table of all substitutions, with three rows per place. contigs: name -> length, in the
    genome's order.
    """
    numbers = {name: number for number, name in enumerate(contigs)}
    contig = np.array([numbers[name] for name in columns["chrom"][::_ALTERNATIVES]], dtype=np.int64)
    place = columns["pos"][::_ALTERNATIVES] - 1
    _, rows = np.unique(np.stack([contig, place]), axis=1, return_index=True)  # sorted, and each place once
    written = []
    for name, values in columns.items():
        if _is_track(name):
            of_places = values.reshape(-1, _ALTERNATIVES).mean(1)[rows]
            path = Path(f"{prefix}.{name}{_ENDING}")
            known = ~np.isnan(of_places)
            _write(path, contigs, contig[rows][known], place[rows][known], of_places[known])
            written.append(path)
    return written


def _is_track(name: str) -> bool:
    return name == "entropy" or name.startswith("llr")


def _write(path: Path, contigs: dict[str, int], contig: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
    temporary, names = temporary_name(path), list(contigs)
    try:
        file = package("pyBigWig").open(str(temporary), "w")
        file.addHeader(list(contigs.items()))
        for number in np.unique(contig):
            mine = contig == number
            starts = place[mine].tolist()
            file.addEntries(names[number], starts, values=values[mine].tolist(), span=1)
        file.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
