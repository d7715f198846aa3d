"""Lists of shards that make each `Shard` on access: of a hundred thousand, a process reads few at a time."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from caduceus.data.cache import Shard
from caduceus.data.remote import join


class ShardList(Sequence[Shard]):
    """Shards of a species from `entries`, rows of the manifest, below `home`; `address`: the server, if any."""

    def __init__(self, home: Path, address: str | None, species: str, entries: list[dict[str, Any]]) -> None:
        self._home = home
        self._address = address
        self._species = species
        self._entries = entries

    @property
    def folders(self) -> set[Path]:
        return {self._home / self._species} if self._entries else set()

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self._shard(entry) for entry in self._entries[number]]
        return self._shard(self._entries[number])

    def _shard(self, entry: dict[str, Any]) -> Shard:
        name = f"{self._species}/{entry['name']}"
        origin = None if self._address is None else join(self._address, name)
        return Shard(self._home / name, entry["bytes"], entry["sha256"], origin)


class JoinedShards(Sequence[Shard]):
    """The shards of several lists, one after the other."""

    def __init__(self, lists: Sequence[Sequence[Shard]]) -> None:
        self._lists = lists
        self._first = list(accumulate(map(len, lists), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        of = bisect_right(self._first, number) - 1
        return self._lists[of][number - self._first[of]]
