"""Describes a folder with a model: `python -m caduceus.hub show`."""

from pathlib import Path
from typing import Any

from torch import Tensor

from caduceus.files import show_bytes
from caduceus.hub.card import facts
from caduceus.hub.checkpoint import PublishedCheckpoint
from caduceus.hub.folders import is_own, load, run_of
from caduceus.hub.published import PublishedLayout
from caduceus.hub.published_config import keys_without_effect
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.patience import is_directory, is_file
from caduceus.run.checkpoints import MARKER


def contents(path: str | Path) -> dict[str, Any]:
    """Facts {name: value} about a run, a checkpoint, an import or a published checkpoint; it loads it like `load`.

    Raises `UserError` where it is not a model, or does not fit.
    """
    if not is_own(path):
        checkpoint = PublishedCheckpoint.open(path)
        model = checkpoint.model()
        return {"holds": "a published checkpoint", **facts(model.config), **_of_published(checkpoint, model)}
    model, run = load(path), run_of(path)
    told = {"holds": "an import", **facts(model.config)}
    if is_directory(run.checkpoints_path):
        newest = run.newest_valid_checkpoint()
        told["holds"] = "a checkpoint of a run" if is_file(Path(path) / MARKER) else "a run"
        told["checkpoints"] = ", ".join(str(checkpoint.step) for checkpoint in run.checkpoints())
        told["newest"] = newest.path if newest else "none"
    return told


def _of_published(checkpoint: PublishedCheckpoint, model: CaduceusForMaskedLM) -> dict[str, Any]:
    tensors = checkpoint.weights.tensors
    told = {
        "configuration": checkpoint.config_path,
        "weights": checkpoint.path,
        "tensors": f"{len(tensors)}, {show_bytes(sum(tensor.nbytes for tensor in tensors.values()))}",
        "precision": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if _is_real(t)})),
        "tied weights": _ties(PublishedLayout(model.config), tensors),
    }
    for name, found in (
        ("keys without effect", keys_without_effect(checkpoint.config)),
        ("tensors left out", sorted(checkpoint.weights.left_out)),
    ):
        if found:
            told[name] = ", ".join(found)
    return told


def _ties(layout: PublishedLayout, tensors: dict[str, Tensor]) -> str:
    both = [all(name in tensors for name in names) for names in layout.tied()]
    if all(both):
        return "are stored under both names, and are equal"
    return "stand under one of their names" if not any(both) else "some are stored under one of their names"


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
