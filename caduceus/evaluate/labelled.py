"""Labelled sequences from tables, and the task that their labels define. Imports no torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.alphabet import reverse_complement
from caduceus.errors import UserError
from caduceus.evaluate.columns import Columns, read_columns
from caduceus.evaluate.windows import checked_bases

TASKS = ("auto", "classification", "regression", "multilabel", "per-base")
_NO_LABEL = "."
_MOST_CLASSES = 100
_BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_TASK_VALUES = ("mean", "spread", "several", "per_base", "values", "bin")


@dataclass(frozen=True)
class Task:
    """What is learnt from labels.

    classes: those of a classification, in the order of the outputs; None for a regression, whose labels are scaled by
    `mean` and `spread` of training. several: a sequence may have any of the classes. per_base: each base, or each
    stretch of `bin` bases, has a label. values: the names of a regression's values, where there are several.
    """

    classes: tuple[str, ...] | None
    mean: float | tuple[float, ...] = 0.0
    spread: float | tuple[float, ...] = 1.0
    several: bool = False
    per_base: bool = False
    values: tuple[str, ...] | None = None
    bin: int = 1

    @property
    def outputs(self) -> int:
        """Number of outputs of a model for a sequence (or base)."""
        return len(self.classes or self.values or ("value",))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Task":
        found = {name: values[name] for name in ("classes", *_TASK_VALUES) if name in values}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


@dataclass(frozen=True)
class Labelled:
    """Sequences as upper-case ASCII, and the label of each: the number of its class, or a value; for several labels, 0
    or 1, or a value, for each; per base an array (L,). NaN, and -1 for a class, mean that there is no label.
    """

    bases: Sequence[np.ndarray]
    labels: Any

    def __len__(self) -> int:
        return len(self.bases)

    @property
    def sizes(self) -> list[int]:
        """Bases of each sequence."""
        return [len(bases) for bases in self.bases]

    def pick(self, rows: np.ndarray) -> "Labelled":
        """The sequences and labels of some rows."""
        picked = self.labels[rows] if isinstance(self.labels, np.ndarray) else [self.labels[row] for row in rows]
        return Labelled([self.bases[row] for row in rows], picked)


@dataclass(frozen=True)
class LabelledTable:
    """The table of a file, with the names of its columns.

    label: a column, or several separated by commas; a column `label` may be called `labels`. longest: the most bases
    that a sequence may have.
    """

    path: str | Path
    column: str = "sequence"
    label: str = "label"
    longest: int | None = None

    @property
    def labels(self) -> list[str]:
        """The names of the columns of labels."""
        return [name.strip() for name in self.label.split(",")]

    def task(self, kind: str) -> Task:
        """The task that its labels define for training."""
        return find_task(self, kind)

    def read(self) -> tuple[list[np.ndarray], list[Any], Columns]:
        """Sequences and labels as in the file. Raises `UserError`, which names file and line, where one is missing or
        invalid.
        """
        columns = read_columns(self.path)
        of_columns = [columns.values[_label_column(columns, name)] for name in self.labels]
        labels = of_columns[0] if len(of_columns) == 1 else list(zip(*of_columns, strict=True))
        bases = read_bases(columns, self.column, self.longest)
        for values in of_columns:
            empty = next((row for row, label in enumerate(values) if label is None or str(label).strip() == ""), None)
            if empty is not None:
                raise UserError(f"{columns.places[empty]}: the label is missing")
        return bases, labels, columns

    def labelled(self, task: Task) -> Labelled:
        """The sequences with labels of a known task. Raises `UserError` for a label that the task does not have."""
        bases, labels, columns = self.read()
        if task.per_base:
            return Labelled(bases, _by_base(task, bases, labels, columns))
        if task.several:
            return Labelled(bases, _several(task, self.labels, labels, columns))
        if task.values:
            return Labelled(bases, _several_values(len(task.values), labels, columns))
        if task.classes is None:
            return Labelled(bases, _numbers(labels, columns))
        numbers = {name: number for number, name in enumerate(task.classes)}
        found = []
        for label, place in zip(labels, columns.places, strict=True):
            if str(label) not in numbers:
                raise _unknown(place, str(label), task)
            found.append(numbers[str(label)])
        return Labelled(bases, np.array(found, dtype=np.int64))


def _label_column(columns: Columns, name: str) -> str:
    either = "labels" if name == "label" and not columns.has("label") and columns.has("labels") else name
    return columns.find(either, what="the labels (--label)")


def _unknown(place: str, label: str, task: Task) -> UserError:
    return UserError(f"{place}: label {label[:40]!r} does not occur in training: {', '.join(task.classes[:10])}")


def _several(task: Task, names: list[str], labels: list[Any], columns: Columns) -> np.ndarray:
    """(n, classes) of 0 and 1, from a column each, from a column of lists, or from a column of names separated by
    semicolons.
    """
    rows = np.zeros((len(labels), len(task.classes)))
    for row, label, place in zip(rows, labels, columns.places, strict=True):
        if _is_list(label):
            _check_count(label, len(task.classes), place)
            for number, value in enumerate(label):
                if str(value).strip().lower() not in _BINARY:
                    name = names[number] if len(names) > 1 else f"label {task.classes[number]}"
                    raise UserError(f"{place}: {name} must be 0 or 1, got {str(value)[:40]!r}")
                row[number] = _BINARY[str(value).strip().lower()]
            continue
        for name in _names_in(label):
            if name not in task.classes:
                raise _unknown(place, name, task)
            row[task.classes.index(name)] = 1
    return rows


def _is_list(label: Any) -> bool:
    return isinstance(label, (list, tuple))


def _check_count(label: Sequence[Any], count: int, place: str) -> None:
    if len(label) != count:
        raise UserError(f"{place}: has {len(label):,} labels, and the first sequence of training {count:,}")


def _several_values(count: int, labels: list[Any], columns: Columns) -> np.ndarray:
    """(n, count) numbers, from a column each or from a column of lists."""
    rows = []
    for label, place in zip(labels, columns.places, strict=True):
        values = label.replace(",", " ").split() if isinstance(label, str) else label
        if not _is_list(values):
            raise UserError(f"{place}: the label must be a list of {count:,} numbers, got {str(label)[:40]!r}")
        _check_count(values, count, place)
        rows.append([_number(value, place) for value in values])
    return np.array(rows)


def _names_in(label: Any) -> list[str]:
    """The names in a label such as promoter;enhancer; a dot has none."""
    return [name.strip() for name in str(label).split(";") if name.strip() not in ("", _NO_LABEL)]


def _by_base(task: Task, bases: list[np.ndarray], labels: list[Any], columns: Columns) -> list[np.ndarray]:
    found = []
    for sequence, label, place in zip(bases, labels, columns.places, strict=True):
        if task.classes is None:
            values = _values_in(label, place)
        else:
            numbers = {_NO_LABEL: -1, **{name: number for number, name in enumerate(task.classes)}}
            unknown = next((name for name in str(label) if name not in numbers), None)
            if unknown is not None:
                raise _unknown(place, unknown, task)
            values = np.array([numbers[name] for name in str(label)], dtype=float)
        if len(values) != len(sequence):
            raise UserError(f"{place}: {len(values):,} labels for a sequence of {len(sequence):,} bases")
        found.append(values)
    return found


def _values_in(label: Any, place: str) -> np.ndarray:
    """Numbers, from a list or from a text that separates them by blanks or commas."""
    values = label.replace(",", " ").split() if isinstance(label, str) else label
    try:
        return np.array([np.nan if value is None or value == _NO_LABEL else float(value) for value in values])
    except (TypeError, ValueError):
        raise UserError(
            f"{place}: labels per base must be numbers, or one letter per base; got {str(label)[:40]!r}"
        ) from None


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
    """The task that the labels of training define: classes where they are text or whole numbers, else values."""
    if kind not in TASKS:
        raise UserError(f"--task: choose one of {', '.join(TASKS)}, got {kind!r}")
    bases, labels, columns = table.read()
    if kind in ("auto", "multilabel", "regression") and (names := _names_of_several(table, labels[0], kind)):
        if kind == "auto":
            binary = all(str(value).strip().lower() in _BINARY for label in labels for value in label)
            kind = "multilabel" if binary or len(table.labels) > 1 else "regression"
        if kind == "multilabel":
            return Task(names, several=True)
        return _task_of_values(table, names, _several_values(len(names), labels, columns))
    if len(table.labels) > 1:
        raise UserError(f"--label: several columns are for --task multilabel or regression, not {kind}")
    if kind == "multilabel":
        names = sorted({name for label in labels for name in _names_in(label)})
        if len(names) < 2:
            raise UserError(
                f"{table.path}: the labels name fewer than two classes; separate the classes of a sequence by ;"
            )
        return Task(tuple(names), several=True)
    if kind == "per-base":
        return _task_by_base(table, bases, labels, columns)
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


def _names_of_several(table: LabelledTable, first: Any, kind: str) -> tuple[str, ...]:
    """The names of a sequence's labels, where it has several: those of their columns, or numbers from 1."""
    if len(table.labels) > 1:
        return tuple(table.labels)
    if kind == "regression" and isinstance(first, str) and len(first.replace(",", " ").split()) > 1:
        first = first.replace(",", " ").split()
    return tuple(str(number) for number in range(1, len(first) + 1)) if _is_list(first) else ()


def _task_of_values(table: LabelledTable, names: tuple[str, ...], labels: np.ndarray) -> Task:
    spread = labels.std(0)
    if not spread.any():
        raise UserError(f"{table.path}: all sequences have the same labels; there is nothing to learn")
    return Task(None, tuple(labels.mean(0).tolist()), tuple(np.where(spread, spread, 1).tolist()), values=names)


def _task_by_base(table: LabelledTable, bases: list[np.ndarray], labels: list[Any], columns: Columns) -> Task:
    """Classes where each base has a letter, else values."""
    letters = isinstance(labels[0], str) and len(labels[0].strip()) == len(bases[0]) > 1
    if letters:
        names = sorted({letter for label in labels for letter in str(label)} - {_NO_LABEL})
        if len(names) < 2:
            raise UserError(f"{table.path}: all labels are {''.join(names)!r}; there is nothing to learn")
        return Task(tuple(names), per_base=True)
    values = np.concatenate(_by_base(Task(None, per_base=True), bases, labels, columns))
    values = values[np.isfinite(values)]
    if not len(values) or values.std() == 0:
        raise UserError(f"{table.path}: all labels are the same; there is nothing to learn")
    return Task(None, float(values.mean()), float(values.std()), per_base=True)


def _are_values(texts: set[str]) -> bool:
    """Whether all are numbers, but not all are whole numbers with few different values."""
    try:
        values = [float(text) for text in texts]
    except ValueError:
        return False
    return len(values) > _MOST_CLASSES or any(value != int(value) for value in values)


def _numbers(labels: list[Any], columns: Columns) -> np.ndarray:
    return np.array([_number(label, place) for label, place in zip(labels, columns.places, strict=True)])


def _number(label: Any, place: str) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{place}: the label of a regression must be a number, got {str(label)[:40]!r}")
    return value


def split_off(data: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """(rest, part): `part` is a random share, at least one sequence, chosen by the seed."""
    order = np.random.default_rng(seed).permutation(len(data))
    count = min(max(1, round(share * len(data))), len(data) - 1)
    return data.pick(np.sort(order[count:])), data.pick(np.sort(order[:count]))


def copies(train: Sequence[np.ndarray], test: Sequence[np.ndarray]) -> tuple[int, int]:
    """How many sequences of test occur in train as they are, and how many only as their reverse complement."""
    known, exact, reverse = set(map(_digest, train)), 0, 0
    for bases in test:
        if _digest(bases) in known:
            exact += 1
        elif _digest(reverse_complement(bases)) in known:
            reverse += 1
    return exact, reverse


def _digest(bases: np.ndarray) -> bytes:
    return hashlib.blake2b(bases.tobytes(), digest_size=16).digest()
