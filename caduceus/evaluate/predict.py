"""Predictions of a fine-tuned model for new sequences."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.distributed.ranks import choose_device
from caduceus.evaluate.classifier import SequenceModel
from caduceus.evaluate.columns import check_table_name, write_columns
from caduceus.evaluate.finetune import output_columns
from caduceus.evaluate.fitting import Examples, Fit, FitOptions
from caduceus.evaluate.model import Runner
from caduceus.evaluate.parts import Parts, cut
from caduceus.evaluate.sequences import Item, SequenceSource
from caduceus.files import sha256_of

_PART_BASES, _PART_SEQUENCES = 1 << 22, 4096


class Predictor:
    """A fine-tuned model of a folder, ready to be run. device: auto, cpu or cuda."""

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        self.folder = Path(folder)
        self.model = SequenceModel.load(folder).to(choose_device(device))
        self.runner = Runner(self.model.backbone, device)

    def predict(self, sequences: Sequence[np.ndarray], batch_bases: int | None = None) -> np.ndarray:
        """Probabilities (n, classes), or values (n,), of upper-case ASCII sequences."""
        most = self.runner.batch_bases(batch_bases)
        fit = Fit(self.model, self.model.task, "", FitOptions(), self.runner, most)
        return fit.outputs(Examples(sequences, np.zeros(len(sequences)), [len(bases) for bases in sequences]))


def predict_file(predictor: Predictor, source: SequenceSource, out: str | Path, batch_bases: int | None = None) -> None:
    """Predict for what `source` holds and write a table to `out`; killed, the same call goes on."""
    check_table_name(out)
    items = source.items()
    origin: dict[str, Any] = {
        "verb": "predict",
        "model": {path.name: sha256_of(path) for path in sorted(predictor.folder.rglob("*")) if path.is_file()},
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
            write_columns(out, {"name": [item.name for item in items], **output_columns(predictor.model.task, outputs)})
            store.finish(sequences=len(items))
