"""Programs of a launch as a GPU may run them: in any order, and not seeing what another of the same launch stores."""

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from triton.runtime import interpreter

_builder = interpreter.interpreter_builder


def shuffle_programs() -> None:
    """Every launch takes its programs in an order of its own, by a generator that begins the same in every process."""
    chance = random.Random(0)
    set_size, set_program = _builder.set_grid_dim, _builder.set_grid_idx
    order: list[int] = []

    def set_grid_dim(*size: int) -> None:
        set_size(*size)
        order[:] = range(np.prod(size))
        chance.shuffle(order)

    def set_grid_idx(*program: int) -> None:
        number = order[np.ravel_multi_index(program, _builder.grid_dim)]
        set_program(*(int(i) for i in np.unravel_index(number, _builder.grid_dim)))

    _builder.set_grid_dim, _builder.set_grid_idx = set_grid_dim, set_grid_idx


class Recorded:
    """The addresses that programs loaded from and stored to, launch by launch."""

    def __init__(self) -> None:
        self.launches = 0
        self.programs = 0
        """In all launches."""
        self.shared: list[str] = []
        """Launches in which a program stored to an address that another one loaded from or stored to."""
        self._loaded: dict[int, list[np.ndarray]] = defaultdict(list)
        self._stored: dict[int, list[np.ndarray]] = defaultdict(list)

    def add(self, addresses: np.ndarray, size: int, stores: bool) -> None:
        halves = addresses.ravel()[:, None] + 2 * np.arange(max(1, size // 2), dtype=addresses.dtype)
        program = int(np.ravel_multi_index(_builder.grid_idx, _builder.grid_dim))
        (self._stored if stores else self._loaded)[program].append(halves.ravel())

    def end_launch(self) -> None:
        """Compare what the programs did."""
        stored, storing = self._sorted(self._stored)
        if len(stored):
            self.launches += 1
            self.programs += len(self._stored)
            twice = (stored[1:] == stored[:-1]) & (storing[1:] != storing[:-1])
            loaded, loading = self._sorted(self._loaded)
            at = np.searchsorted(stored, loaded).clip(max=len(stored) - 1)
            foreign = (stored[at] == loaded) & (storing[at] != loading)
            if twice.any() or foreign.any():
                self.shared.append(
                    f"{len(self._stored)} programs: {twice.sum()} addresses stored to by two, "
                    f"{foreign.sum()} loaded by one and stored to by another"
                )
        self._loaded.clear()
        self._stored.clear()

    @staticmethod
    def _sorted(by_program: dict[int, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Addresses in order without repeats by one program, and their programs."""
        found = [(np.unique(np.concatenate(parts)), program) for program, parts in by_program.items()]
        if not found:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        addresses = np.concatenate([part for part, _ in found])
        programs = np.concatenate([np.full(len(part), program) for part, program in found])
        order = np.argsort(addresses, kind="stable")
        return addresses[order], programs[order]


@contextmanager
def recorded_programs() -> Iterator[Recorded]:
    """Records every load and store of the launches within."""
    recorded = Recorded()
    kept = {name: getattr(_builder, name) for name in ("set_grid_dim", "create_masked_load", "create_masked_store")}

    def set_grid_dim(*size: int) -> None:
        recorded.end_launch()
        kept["set_grid_dim"](*size)

    def create_masked_load(ptrs, mask, *rest):
        recorded.add(ptrs.data[mask.data], ptrs.get_element_ty().primitive_bitwidth // 8, stores=False)
        return kept["create_masked_load"](ptrs, mask, *rest)

    def create_masked_store(ptrs, value, mask, *rest):
        recorded.add(ptrs.data[mask.data], ptrs.get_element_ty().primitive_bitwidth // 8, stores=True)
        return kept["create_masked_store"](ptrs, value, mask, *rest)

    patched = (set_grid_dim, create_masked_load, create_masked_store)
    for function in patched:
        setattr(_builder, function.__name__, function)
    try:
        yield recorded
        recorded.end_launch()
    finally:
        for name, function in kept.items():
            setattr(_builder, name, function)
