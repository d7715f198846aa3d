"""Labelled sequences of tables, and what is to be learnt of them. Imports no torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.alphabet import reverse_complement
from caduceus.errors import UserError
from caduceus.evaluate.columns import Columns, read_columns
from caduceus.evaluate.windows import checked_bases

TASKS = ("auto", "classification", "regression")
_MOST_CLASSES = 100


@dataclass(frozen=True)
class Task:
    """A classification, with its classes in the order of the outputs, or a regression, where `classes` is None.

    mean, spread: of the labels of training, by which the labels of a regression are scaled."""

    classes: tuple[str, ...] | None
    mean: float = 0.0
    spread: float = 1.0

    @property
    def outputs(self) -> int:
        """Numbers that a model gives for a sequence."""
        return 1 if self.classes is None else len(self.classes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Task":
        classes = values["classes"]
        return cls(None if classes is None else tuple(classes), values["mean"], values["spread"])


@dataclass(frozen=True)
class Labelled:
    """Sequences as upper-case ASCII, and the label of each: the number of its class, or a value."""

    bases: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.bases)

    def pick(self, rows: np.ndarray) -> "Labelled":
        return Labelled([self.bases[row] for row in rows], self.labels[rows])


@dataclass(frozen=True)
class LabelledTable:
    """The table of a file with the names of its columns; longest: the most bases that a sequence may have."""

    path: str | Path
    column: str = "sequence"
    label: str = "label"
    longest: int | None = None

    def read(self) -> tuple[list[np.ndarray], list[Any], Columns]:
        """Sequences and labels as they stand. What is missing or none is a `UserError` that names file and line."""
        columns = read_columns(self.path)
        labels = columns.values[columns.find(self.label, what="the labels (--label)")]
        bases = read_bases(columns, self.column, self.longest)
        empty = next((row for row, label in enumerate(labels) if label is None or str(label).strip() == ""), None)
        if empty is not None:
            raise UserError(f"{columns.places[empty]}: the label is missing")
        return bases, labels, columns

    def labelled(self, task: Task) -> Labelled:
        """With the labels of a task that is known; one that it does not have is a `UserError`."""
        bases, labels, columns = self.read()
        if task.classes is None:
            return Labelled(bases, _numbers(labels, columns))
        numbers = {name: number for number, name in enumerate(task.classes)}
        found = []
        for label, place in zip(labels, columns.places, strict=True):
            if str(label) not in numbers:
                raise UserError(
                    f"{place}: label {str(label)[:40]!r} is none of training: {', '.join(task.classes[:10])}"
                )
            found.append(numbers[str(label)])
        return Labelled(bases, np.array(found, dtype=np.int64))


def read_bases(columns: Columns, column: str, longest: int | None) -> list[np.ndarray]:
    """The sequences of a table, none longer than `longest`."""
    found = []
    texts = columns.values[columns.find(column, what="the sequences (--column)")]
    for text, place in zip(texts, columns.places, strict=True):
        bases = checked_bases("" if text is None else str(text), place)
        if longest is not None and len(bases) > longest:
            raise UserError(f"{place}: the sequence has {len(bases):,} bases, more than --longest {longest:,}")
        found.append(bases)
    return found


def find_task(table: LabelledTable, kind: str) -> Task:
    """What the labels of training are: classes, where they are text or whole numbers, or values."""
    if kind not in TASKS:
        raise UserError(f"--task: choose one of {', '.join(TASKS)}, got {kind!r}")
    _, labels, columns = table.read()
    texts = {str(label) for label in labels}
    if kind == "auto":
        kind = "regression" if _are_values(texts) else "classification"
    if kind == "regression":
        values = _numbers(labels, columns)
        if values.std() == 0:
            raise UserError(f"{table.path}: all labels are {values[0]:g}; there is nothing to learn")
        return Task(None, float(values.mean()), float(values.std()))
    classes = sorted(texts, key=lambda text: (not text.lstrip("-").isdecimal(), len(text) * text.isdecimal(), text))
    if len(classes) < 2:
        raise UserError(f"{table.path}: all labels are {classes[0]!r}; there is nothing to learn")
    if len(classes) > _MOST_CLASSES:
        raise UserError(
            f"{table.path}: {len(classes):,} different labels are more classes than {_MOST_CLASSES}; --task regression "
            "learns values"
        )
    return Task(tuple(classes))


def _are_values(texts: set[str]) -> bool:
    """Whether all are numbers, and not all are whole ones of a few."""
    try:
        values = [float(text) for text in texts]
    except ValueError:
        return False
    return len(values) > _MOST_CLASSES or any(value != int(value) for value in values)


def _numbers(labels: list[Any], columns: Columns) -> np.ndarray:
    values = []
    for label, place in zip(labels, columns.places, strict=True):
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = float("nan")
        if not np.isfinite(value):
            raise UserError(f"{place}: the label of a regression must be a number, got {str(label)[:40]!r}")
        values.append(value)
    return np.array(values)


def split_off(data: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """(rest, part): a random share, at least one sequence, chosen by the seed."""
    order = np.random.default_rng(seed).permutation(len(data))
    count = min(max(1, round(share * len(data))), len(data) - 1)
    return data.pick(np.sort(order[count:])), data.pick(np.sort(order[:count]))


def copies(train: list[np.ndarray], test: list[np.ndarray]) -> tuple[int, int]:
    """How many sequences of test stand in train as they are, and how many only as their reverse complement."""
    known = {bases.tobytes() for bases in train}
    exact = sum(bases.tobytes() in known for bases in test)
    either = sum(bases.tobytes() in known or reverse_complement(bases).tobytes() in known for bases in test)
    return exact, either - exact
