"""Values that change at given steps of a run, written as [[step, value], …]; how many sequences come before a step.

Imports no torch.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from caduceus.config.data import DataConfig
from caduceus.config.train import TrainConfig
from caduceus.errors import UserError


def points_of(name: str, given: Any, value_of: Callable[[Any], Any]) -> list[tuple[int, Any]]:
    """The list of a key `name` as (steps made before, value), in the order of steps, from step 0 on.

    `value_of` converts a value, or raises `ValueError`. Raises `UserError` for anything but a list of [step, value].
    """
    listed = given if isinstance(given, list) else []
    points = []
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 2 or not _is_whole(entry[0]):
            raise UserError(f"{name}: expected a list of [step, value]; got {entry}")
        try:
            points.append((entry[0], value_of(entry[1])))
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    steps = [step for step, _ in points]
    if not points or steps != sorted(set(steps)) or steps[0] != 0:
        raise UserError(f"{name}: expected a list of [step, value], whose steps go up from 0; got {given}")
    return points


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def batch_size(value: Any) -> int:
    """A number of sequences."""
    if not _is_whole(value) or value == 0:
        raise ValueError(f"a global batch is a whole number of at least 1, got {value}")
    return value


def share(value: Any) -> float:
    """A number above 0 and at most 1."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"a share is a number above 0 and at most 1, got {value}")
    return float(value)


def factors(value: Any) -> dict[str, float]:
    """Factors of the species' weights, checked: {species: factor}."""
    well = isinstance(value, dict) and all(isinstance(species, str) for species in value)
    if not well or not all(_is_number(factor) and 0 <= factor < math.inf for factor in value.values()):
        raise ValueError(f"expected factors by species, as {{human: 4, mouse: 0}}; got {value}")
    return value


def factors_by_step(data: DataConfig) -> list[tuple[int, dict[str, float]]]:
    """(steps made before, factors of the weights by species) of `data.species_weights`."""
    given = data.species_weights
    by_step = given if isinstance(given, list) else [[0, {} if given is None else given]]
    return points_of("data.species_weights", by_step, factors)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class BatchRamp:
    """Sequences per optimizer step: `sizes[i]` once `steps[i]` steps have been made.

    A step counts when its samples were taken: a run that is rewound after a spike continues with later samples, and
    does not take the same ones again.
    """

    steps: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, train: TrainConfig) -> "BatchRamp":
        """The ramp of `train.batch_ramp` and `train.global_batch`."""
        if train.batch_ramp is None:
            return cls((0,), (train.global_batch,))
        points = points_of("train.batch_ramp", train.batch_ramp, batch_size)
        return cls(*zip(*points, strict=True))

    def size(self, steps: int) -> int:
        """Sequences of the step that follows the first `steps` steps."""
        return self.sizes[bisect_right(self.steps, steps) - 1]

    def samples_before(self, steps: int) -> int:
        """Sequences of the first `steps` steps together."""
        ends = [*self.steps[1:], steps]
        parts = zip(self.steps, ends, self.sizes, strict=True)
        return sum(max(0, min(end, steps) - first) * size for first, end, size in parts)

    def steps_before(self, samples: int) -> int:
        """How many whole steps the first `samples` sequences make; a remainder belongs to the next step."""
        stage = bisect_right([self.samples_before(step) for step in self.steps], samples) - 1
        first = self.steps[stage]
        return first + (samples - self.samples_before(first)) // self.sizes[stage]
