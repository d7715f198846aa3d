"""Divides long work into parts that survive a kill, and that the ranks of torchrun share.

The results for OUT are first saved as OUT.parts/000000.npz, …, each whole or absent, with a fingerprint of their
inputs. The same command goes on with the missing parts; another command begins anew.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from caduceus.distributed.environment import choose_interface
from caduceus.distributed.ranks import PATIENCE, Ranks
from caduceus.errors import UserError
from caduceus.files import dump_json, fingerprint, replacing, write_atomically
from caduceus.patience import is_directory, is_file
from data_prep.progress import Progress, note

Item = TypeVar("Item")
_ORIGIN = "made-from.json"


def cut(items: Sequence[Item], size: Callable[[Item], int], most: int, most_items: int) -> list[Sequence[Item]]:
    """Items in their order, in parts of at most `most_items` items with a total size of at most `most` (or of one
    item).
    """
    parts, first, total = [], 0, 0
    for place, item in enumerate(items):
        amount = size(item)
        if place > first and (total + amount > most or place - first == most_items):
            parts.append(items[first:place])
            first, total = place, 0
        total += amount
    return [*parts, items[first:]] if first < len(items) else parts


_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this process does not share work with the other ranks."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def is_within_a_run() -> bool:
    """Whether this process is in `alone`, within a run."""
    return _ALONE.get()


def is_alone() -> bool:
    """Whether this process shares its work with no other rank."""
    return _ALONE.get() or int(os.environ.get("WORLD_SIZE", 1)) == 1


def ranks_here() -> Ranks:
    """This process among those that torchrun or the launcher started, or alone. The first call connects them."""
    if _ALONE.get():
        return Ranks(0, 1, 1, torch.device("cpu"))
    return _ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@functools.cache
def _ranks(rank: int, world: int) -> Ranks:
    if world > 1 and not dist.is_initialized():
        choose_interface(world)
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(rank, world, 1, torch.device("cpu"))


class Parts:
    """The parts of one output. `origin` holds all values that decide their content; `ranks` share the work.

    A failure on one rank is raised on all.
    """

    def __init__(self, out: str | Path, origin: dict[str, Any], ranks: Ranks | None = None) -> None:
        self.out = Path(out)
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self.origin = {**origin, "fingerprint": fingerprint(origin)}
        self.ranks = ranks or ranks_here()

    def _begin(self) -> None:
        """Remove parts that an earlier command made from other inputs."""
        content = dump_json(self.origin)
        stamp = self.folder / _ORIGIN
        if is_directory(self.folder) and not (is_file(stamp) and stamp.read_bytes() == content):
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(stamp, content)
        except OSError as error:
            raise UserError(f"--out: {self.folder} cannot be written ({error.strerror})") from None

    def run(
        self,
        label: str,
        parts: Sequence[Sequence[Item]],
        size: Callable[[Item], int],
        compute: Callable[[Sequence[Item]], dict[str, np.ndarray]],
        unit: str,
    ) -> None:
        """Compute and save this rank's share of the missing parts. Afterwards those of all ranks exist."""
        with self.ranks.agreeing():
            if self.ranks.is_main:
                self._begin()
        with self.ranks.agreeing():
            mine = [number for number in range(len(parts)) if number % self.ranks.world == self.ranks.rank]
            missing = [number for number in mine if not is_file(self._path(number))]
            if len(missing) < len(mine):
                note(f"{self.out}: {len(mine) - len(missing)} of {len(mine)} parts are there already")
            with Progress(label, sum(size(item) for number in missing for item in parts[number]), unit) as progress:
                for number in missing:
                    results = compute(parts[number])
                    with replacing(self._path(number)) as file:
                        np.savez(file, **results)
                    progress.add(sum(map(size, parts[number])))

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """A context for writing OUT, after `run`; yields whether this rank writes it."""
        with self.ranks.agreeing():
            yield self.ranks.is_main

    def load(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the results of the parts, in their order."""
        for number in range(count):
            with np.load(self._path(number), allow_pickle=False) as arrays:
                yield {name: arrays[name] for name in arrays.files}

    def is_finished(self) -> bool:
        """Whether OUT is there, made of the same values, by the record beside it."""
        record = self._record
        return is_file(self.out) and is_file(record) and _fingerprint_in(record) == self.origin["fingerprint"]

    def finish(self, **more: Any) -> None:
        """After OUT is written: write beside it how it was made, and remove the parts."""
        write_atomically(self._record, dump_json({**self.origin, **more}))
        self.drop()

    def drop(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self.folder)

    @property
    def _record(self) -> Path:
        return self.out.with_name(f"{self.out.name}.json")

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"


def _fingerprint_in(record: Path) -> Any:
    try:
        return json.loads(record.read_bytes())["fingerprint"]
    except (ValueError, KeyError, TypeError):
        return None
