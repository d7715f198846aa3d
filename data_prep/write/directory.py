"""A dataset's directory while the dataset is made: lock, unfinished species, finished parts, manifest."""

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from caduceus.data.format import build_manifest, index_path, load_manifest
from caduceus.errors import UserError
from caduceus.files import (
    append_json_line,
    dump_json,
    fingerprint,
    is_disk_full,
    read_json_lines,
    sha256_of,
    take_lock,
    write_atomically,
)
from caduceus.patience import exists, is_directory, is_file, listed, patient, patiently
from data_prep.plan.options import PlanOptions
from data_prep.progress import note
from data_prep.write.report import write_report
from data_prep.write.window_tables import known_tables, remove_other_tables, window_tables

LOCK = ".lock"
JOURNAL = ".unfinished.jsonl"
PLAN = ".plan.npz"
"""The plan of a species whose shards several tasks write: data_prep/write/kept_plan.py."""
_JOURNALS_OF_SHARES = ".unfinished-*.jsonl"
_NEWER_OPTIONS = {"contigs": PlanOptions.contigs}
"""The values of newer options with which datasets of earlier versions were made."""
_WEIGHTS = ("weight", "weight_exponent")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which a failure of the disk while `path` is written becomes a `UserError`."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            reason = f"the disk is full ({error.strerror}); make room"
        else:
            reason = f"cannot be written ({error.strerror}); mend that"
        raise UserError(f"{path}: {reason} and run the same command again to go on") from None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """A context that makes the directory where it is absent, and locks it against other runs; a killed run's lock ends
    with it.
    """
    made = not patiently(directory.exists)
    try:
        patiently(lambda: directory.mkdir(parents=True, exist_ok=True))
        file = patiently(lambda: take_lock(directory / LOCK, wait=False))
    except BlockingIOError:
        raise UserError(f"{directory}: another run is writing here; wait for it or choose another --out") from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            way_on = "its file system has no locks", "shard to a local disk and copy"
        else:
            way_on = "cannot be written to", "choose another --out"
        raise UserError(f"{directory}: {way_on[0]} ({error.strerror}); {way_on[1]}") from None
    with file:
        try:
            with writing(directory):
                _remove_leftovers(directory)
                yield
        except BaseException:
            with suppress(OSError):
                _remove_leftovers(directory)
            if made and [path.name for path in listed(directory)] == [LOCK]:  # nothing was written into it
                (directory / LOCK).unlink()
                directory.rmdir()
            raise


@patient
def refuse_if_locked(directory: Path) -> None:
    """Raise `UserError` where another run holds the lock, to fail before long work."""
    if exists(directory / LOCK):
        with locked(directory):
            pass


class SpeciesDirectory:
    """OUT/SPECIES, from its first shard to its `species.json`.

    While unfinished it holds a journal: the identity of what is being made, then one line per finished shard, so that
    after a kill the next run writes only the missing shards. Tasks that share the work have a journal each, as two
    nodes cannot append to the same file. A species that has lost shards is unfinished again.
    """

    def __init__(self, dataset: Path, identity: dict[str, Any]) -> None:
        self.path = dataset / identity["species"]
        self.identity = identity
        self._part, self._journal = self.path / "species.json", self.path / JOURNAL

    @patient
    def finished(self) -> bool:
        """Whether the species is complete. Raises `UserError` where it is of another genome or other options."""
        if exists(self._part):
            part = read_part(self._part)
            self._require_same(part_identity(part), "holds")
            return not damaged_shards(self.path, part)
        if exists(self._journal):
            self._require_same(_read_journal(self._journal)[0], "was begun with")
        return False

    @patient
    def begin(self) -> dict[str, dict[str, Any]]:
        """Prepare the directory for writing, and return the finished shards of an earlier run, by name."""
        self.path.mkdir(exist_ok=True)
        rows = shard_rows(read_part(self._part)) if exists(self._part) else self.begun()
        finished = {row["name"]: row for row in rows if is_whole(self.path, row)}
        # It is written anew: a line that a kill cut short must not spoil the next line.
        lines = [json.dumps(row) + "\n" for row in (self.identity, *finished.values())]
        write_atomically(self._journal, "".join(lines).encode())
        if exists(self._part):
            lost = len(rows) - len(finished)
            note(f"{self.path}: {lost} of {len(rows)} shards are missing or damaged; writing them again")
            self._part.unlink()
        for path in listed(self.path, _JOURNALS_OF_SHARES):
            path.unlink()
        return finished

    @patient
    def begun(self) -> list[dict[str, Any]]:
        """The journals' rows of the shards that were written so far; shards may have been lost since."""
        own = _read_journal(self._journal)[1:] if exists(self._journal) else []
        return own + [row for path in listed(self.path, _JOURNALS_OF_SHARES) for row in read_json_lines(path)]

    @patient
    def update_weight(self, weight: Callable[[dict[str, Any]], float]) -> None:
        """Give a finished species the weight that is asked for now; its shards do not depend on it.

        `weight`: its report -> its share in the mixture.
        """
        part = read_part(self._part)
        plan = {**part["plan"], **{key: self.identity["plan"][key] for key in _WEIGHTS}}
        if part["plan"] != plan:
            write_atomically(self._part, dump_json({**part, "plan": plan, "weight": weight(part["report"])}))

    @patient
    def record(self, shard: dict[str, Any], share: int | None = None) -> None:
        """Record a shard as finished; `share`: the number of the task's share, for tasks that share the work."""
        append_json_line(self._journal if share is None else self.path / f".unfinished-{share:06d}.jsonl", shard)

    @patient
    def finish(self, part: dict[str, Any]) -> None:
        """Write the species' part of the manifest: the species is complete."""
        write_atomically(self._part, dump_json(part))
        for path in (self._journal, self.path / PLAN):
            path.unlink(missing_ok=True)

    def _require_same(self, found: dict[str, Any], how: str) -> None:
        was, now = _of_shards(found), _of_shards(self.identity)
        if was == now:
            return
        key = next(key for key in [*now, *was] if was.get(key) != now.get(key))
        raise UserError(
            f"{self.path}: {how} {key} {was.get(key)!r}, but now it is {now.get(key)!r} "
            f"(fingerprints {fingerprint(was)[:12]} and {fingerprint(now)[:12]}); "
            f"choose another --out, or delete {self.path}"
        )


def shard_rows(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all shards in a species' part of a manifest."""
    return [shard for split in part["splits"].values() for shard in split["shards"]]


@patient
def is_whole(folder: Path, row: dict[str, Any]) -> bool:
    """Whether a shard is whole, by its tar's size and its index's sha256; only --verify hashes all tars."""
    tar = folder / row["name"]
    index = index_path(tar)
    if not is_file(tar) or patiently(tar.stat).st_size != row["bytes"] or not is_file(index):
        return False
    return sha256_of(index) == row["index_sha256"]


def damaged_shards(folder: Path, part: dict[str, Any]) -> list[str]:
    """Names of a species' shards that are missing or not whole."""
    return [row["name"] for row in shard_rows(part) if not is_whole(folder, row)]


def part_identity(part: dict[str, Any]) -> dict[str, Any]:
    """The identity of the species that a part of a manifest describes."""
    keys = ("assembly", "file", "sha256", "plan")
    return {"species": part["name"], **{key: part[key] for key in keys}}


@patient
def read_part(path: Path) -> dict[str, Any]:
    """A species.json."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a species' part of a manifest ({error})") from None


@patient
def check_species(directory: Path, names: list[str], add: bool) -> None:
    """Raise `UserError` for a directory that holds anything but (some of) these species, unless with `add`."""
    if not exists(directory):
        return
    if not is_directory(directory):
        raise UserError(f"{directory}: is not a directory; choose another --out")
    present = [path for path in listed(directory) if not path.name.startswith(".") and path.suffix != ".npy"]
    species = {path.name for path in present if exists(path / "species.json") or exists(path / JOURNAL)}
    known = species | {"manifest.json", "report.html", *names}
    foreign = [path.name for path in present if path.name not in known]
    if foreign and not species:
        raise UserError(f"{directory}: holds {foreign[0]} and no shard dataset; choose another --out")
    for name in set(names) - species:
        if any(not path.name.startswith(".") for path in listed(directory / name, "*")):
            raise UserError(f"{directory / name}: holds other files; choose another --out or another species name")
    others = sorted(species - set(names))
    if others and not add:
        raise UserError(
            f"{directory}: holds another dataset (species {', '.join(others)}); choose another --out, or give --add "
            "to add to it"
        )


def refuse_unseen_copies(parts: list[dict[str, Any]], names: Iterable[str]) -> None:
    """Refuse species beside those of a dataset that `--homology` made: it looked for near copies among those."""
    others = sorted(set(names) - {part["name"] for part in parts})
    made = [part["name"] for part in parts if "homology_over" in part.get("plan", {})]
    if others and made:
        raise UserError(
            f"species {made[0]}: --homology looked for near copies among the species of its command, of which "
            f"{others[0]} is none; make all of them in one command"
        )


def parts_of(directory: Path) -> list[dict[str, Any]]:
    """The finished species of a directory."""
    return [read_part(part) for part in listed(directory, "*/species.json")]


@patient
def write_manifest(directory: Path, anew: bool = False) -> dict[str, Any]:
    """Write tables, `report.html` and, last, `manifest.json` over all finished species of a directory.

    Existing tables that fit are kept, unless `anew`.
    """
    path = directory / "manifest.json"
    parts = parts_of(directory)
    manifest = build_manifest(parts)
    before: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        before = json.loads(path.read_bytes())
    tables = None if anew else known_tables(directory, before, manifest["fingerprint"])
    if tables is None:
        tables = window_tables(directory, manifest)
    manifest = build_manifest(parts, tables)
    if before != manifest or not exists(directory / "report.html"):
        write_report(directory, manifest)
        write_atomically(path, dump_json(manifest))
    remove_other_tables(directory, tables)
    return load_manifest(directory)


@patient
def _remove_leftovers(directory: Path) -> None:
    """Remove what killed runs left: partly written files, and the journals and plans of finished species."""
    leftovers = [*listed(directory, ".*.tmp"), *listed(directory, "*/.*.tmp")]
    unfinished = [path for name in (JOURNAL, PLAN, _JOURNALS_OF_SHARES) for path in listed(directory, f"*/{name}")]
    leftovers += [path for path in unfinished if exists(path.parent / "species.json")]
    for path in leftovers:
        if is_directory(path):
            shutil.rmtree(path)
        else:
            path.unlink()


def _read_journal(path: Path) -> list[dict[str, Any]]:
    rows = read_json_lines(path)
    if not rows or "species" not in rows[0]:
        raise UserError(f"{path}: is damaged; delete {path.parent} and run the command again")
    return rows


def _of_shards(identity: dict[str, Any]) -> dict[str, Any]:
    """The values of an identity that decide the bytes of the shards, without nesting."""
    flat = {**_NEWER_OPTIONS, **identity, **identity["plan"]}
    return {key: value for key, value in flat.items() if key not in ("plan", *_WEIGHTS)}
