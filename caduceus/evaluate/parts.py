"""Long work in parts that a kill does not undo, shared by the ranks of torchrun.

What a command will write to OUT is first kept as OUT.parts/000000.npz, …, each whole or absent, under the fingerprint
of what it is made from. The same command goes on with the parts that are missing; another one begins anew.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from caduceus.errors import UserError
from caduceus.files import dump_json, fingerprint, replacing, write_atomically
from data_prep.progress import Progress, note

Item = TypeVar("Item")
_ORIGIN = "made-from.json"


def cut(items: Sequence[Item], size: Callable[[Item], int], most: int, most_items: int) -> list[Sequence[Item]]:
    """Items in their order, in parts of at most `most_items` whose sizes add up to at most `most` (or one item)."""
    parts, first, total = [], 0, 0
    for place, item in enumerate(items):
        amount = size(item)
        if place > first and (total + amount > most or place - first == most_items):
            parts.append(items[first:place])
            first, total = place, 0
        total += amount
    return [*parts, items[first:]] if first < len(items) else parts


class Parts:
    """The parts of one output. `origin` says all that decides what they hold."""

    def __init__(self, out: str | Path, origin: dict[str, Any]) -> None:
        self.out = Path(out)
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self.origin = {**origin, "fingerprint": fingerprint(origin)}
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def begin(self) -> None:
        """Make room: on the first rank, drop what an earlier command left that was made from something else."""
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")
        if self.rank == 0:
            content = dump_json(self.origin)
            stamp = self.folder / _ORIGIN
            if self.folder.is_dir() and not (stamp.is_file() and stamp.read_bytes() == content):
                shutil.rmtree(self.folder)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(stamp, content)
            except OSError as error:
                raise UserError(f"--out: {self.folder} cannot be written ({error.strerror})") from None
        self.barrier()

    def run(
        self,
        label: str,
        parts: Sequence[Sequence[Item]],
        size: Callable[[Item], int],
        compute: Callable[[Sequence[Item]], dict[str, np.ndarray]],
        unit: str,
    ) -> bool:
        """Compute and keep this rank's share of the parts that are missing; whether this is the rank that writes OUT.

        After it, all parts of all ranks are there.
        """
        self.begin()
        mine = [number for number in range(len(parts)) if number % self.world == self.rank]
        missing = [number for number in mine if not self._path(number).is_file()]
        if len(missing) < len(mine):
            note(f"{self.out}: {len(mine) - len(missing)} of {len(mine)} parts are there already")
        with Progress(label, sum(size(item) for number in missing for item in parts[number]), unit) as progress:
            for number in missing:
                results = compute(parts[number])
                with replacing(self._path(number)) as file:
                    np.savez(file, **results)
                progress.add(sum(map(size, parts[number])))
        self.barrier()
        return self.rank == 0

    def load(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """The results of the parts, in their order."""
        for number in range(count):
            with np.load(self._path(number), allow_pickle=False) as arrays:
                yield {name: arrays[name] for name in arrays.files}

    def finish(self, **more: Any) -> None:
        """After OUT is written: say beside it how it was made, and drop the parts."""
        write_atomically(self.out.with_name(f"{self.out.name}.json"), dump_json({**self.origin, **more}))
        shutil.rmtree(self.folder)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"
