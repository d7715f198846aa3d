"""Predicts with a fine-tuned model for new sequences."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.distributed.ranks import choose_device
from caduceus.evaluate.classifier import SequenceModel
from caduceus.evaluate.columns import check_table_name, write_columns
from caduceus.evaluate.examples import Examples
from caduceus.evaluate.fitting import outputs_of, predicted
from caduceus.evaluate.model import Runner
from caduceus.evaluate.parts import Parts, cut
from caduceus.evaluate.results import output_columns, place_columns
from caduceus.evaluate.sequences import Item, SequenceSource
from caduceus.files import sha256_of
from caduceus.patience import is_file

_PART_BASES, _PART_SEQUENCES = 1 << 22, 4096


class Predictor:
    """A fine-tuned model, loaded from a folder. device: auto, cpu or cuda."""

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        self.folder = Path(folder)
        self.model = SequenceModel.load(folder).to(choose_device(device))
        self.runner = Runner(self.model.backbone, device)

    def predict(self, sequences: Sequence[np.ndarray], batch_bases: int | None = None) -> np.ndarray:
        """Probabilities (n, classes), or values (n,), for upper-case ASCII sequences; per base, n counts bases."""
        sizes = [len(bases) for bases in sequences]
        outputs = outputs_of(self.model, self.runner, Examples(sequences, sizes, sizes), batch_bases)
        return predicted(self.model.task, outputs)


def predict_file(predictor: Predictor, source: SequenceSource, out: str | Path, batch_bases: int | None = None) -> None:
    """Predict for the sequences of `source` and write a table to `out`. After a kill the same call goes on."""
    check_table_name(out)
    items = source.items()
    origin: dict[str, Any] = {
        "verb": "predict",
        "model": {path.name: sha256_of(path) for path in sorted(predictor.folder.rglob("*")) if is_file(path)},
        "input_sha256": source.sha256(),
        "source": {key: value and str(value) for key, value in asdict(source).items()},
    }
    parts = cut(items, lambda item: item.length, _PART_BASES, _PART_SEQUENCES)
    store = Parts(out, origin)

    def compute(part: Sequence[Item]) -> dict[str, np.ndarray]:
        return {"outputs": predictor.predict([item.read() for item in part], batch_bases)}

    store.run("predicting", parts, lambda item: item.length, compute, "bases")
    with store.writing() as writes:
        if writes:
            outputs = np.concatenate([arrays["outputs"] for arrays in store.load(len(parts))])
            task, names = predictor.model.task, [item.name for item in items]
            places = place_columns(task, names, [item.length for item in items])
            write_columns(out, {"name": names, **places, **output_columns(task, outputs)})
            store.finish(sequences=len(items))
