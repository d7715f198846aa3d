"""Labels of variants whose effect is known, and how well each score finds the positive ones. Imports no torch."""

from dataclasses import dataclass

import numpy as np

from caduceus.errors import UserError
from caduceus.evaluate.metrics import ranking
from caduceus.evaluate.variant_inputs import VariantFile
from caduceus.tables import is_missing

_YES, _NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
_AREAS = ("auprc", "auroc")


@dataclass(frozen=True)
class Labels:
    """Where labels come from.

    name: an entry of a VCF's INFO, or a column of a table. positive: the values that are positive; by default 1, true
    or yes are positive, and 0, false or no negative. Variants without a value are left out. Where an entry of INFO has
    no values (a flag), records with it are positive, and the others negative.
    """

    name: str
    positive: tuple[str, ...] = ()

    def of(self, file: VariantFile) -> np.ndarray:
        """The label of each allele, (n,) float64: 1, 0, or NaN where it is left out. Raises `UserError` unless both
        occur.
        """
        texts = _entries(file, self.name) if file.vcf is not None else _values(file, self.name)
        found = np.array([self._one(text, allele.place) for text, allele in zip(texts, file.alleles, strict=True)])
        if not (found == 1).any() or not (found == 0).any():
            values = ", ".join(sorted({text for text in texts if text is not None})[:8])
            missing = "negative" if (found == 1).any() else "positive"
            raise UserError(
                f"--label: {file.source}: no variant is {missing} by {self.name}, which has {values}; give the "
                "positive values with --positive"
            )
        return found

    def _one(self, text: str | None, place: str) -> float:
        if text is None:
            return np.nan
        if self.positive:
            return float(text in self.positive)
        if text.lower() not in (*_YES, *_NO):
            raise UserError(f"{place}: {self.name} is {text[:40]!r}; give the positive values with --positive")
        return float(text.lower() in _YES)


def _values(file: VariantFile, name: str) -> list[str | None]:
    """The values of a column; None for a row without one."""
    column = file.columns.values[file.columns.find(name, what="the labels (--label)")]
    texts = [column[row] for row in file.rows]
    return [None if text is None or is_missing(str(text)) else str(text).strip() for text in texts]


def _entries(file: VariantFile, name: str) -> list[str | None]:
    """The values of an entry of INFO: one for each ALT where there are as many, otherwise that of the record."""
    of_records = [record.info() for record in file.vcf.records]
    if not any(name in info for info in of_records):
        known = ", ".join(sorted({key for info in of_records for key in info})[:12]) or "none"
        raise UserError(f"--label: {file.source}: no record has {name!r} in INFO; they have {known}")
    is_flag = all(info.get(name, "") == "" for info in of_records)
    found: list[str | None] = []
    for info, record in zip(of_records, file.vcf.records, strict=True):
        count = max(len(record.alts), 1)
        if is_flag:
            found += [str(int(name in info))] * count
            continue
        text = info.get(name, ".")
        values = text.split(",") if text.count(",") == count - 1 else [text] * count
        found += [None if is_missing(value) else value for value in values]
    return found


def area_names(columns: list[str]) -> list[str]:
    """The names of the areas under curves for these scores."""
    return [f"{area}_{name}" for name in _directed({name: np.zeros(0) for name in columns}) for area in _AREAS]


def areas(labels: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, float]:
    """AUPRC and AUROC of each score over the variants with a label and this score, and their number.

    `…_llr` ranks a variant as more positive the less likely its ALT is, `…_abs_llr` the more the likelihoods of ALT and
    REF differ, `…_embedding_…` the farther apart the embeddings are. NaN where one class is missing.
    """
    found: dict[str, float] = {}
    for name, values in _directed(scores).items():
        known = ~np.isnan(labels) & ~np.isnan(values)
        found |= {f"{area}_{name}": ranking(area, labels[known] == 1, values[known]) for area in _AREAS}
    return {**found, "positives": int((labels == 1).sum()), "negatives": int((labels == 0).sum())}


def _directed(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scores turned so that a larger one means a larger effect."""
    found = {}
    for name, values in scores.items():
        if name.startswith("llr"):
            found |= {name: -values, f"abs_{name}": np.abs(values)}
        elif name.startswith("embedding"):
            found[name] = values
    return found
