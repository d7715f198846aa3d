"""Checkpoints: model and optimizer through torch.distributed.checkpoint, the rest as JSON and RNG states."""

import json
import random
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from caduceus.data.shards import dump_json, write_atomically
from caduceus.errors import UserError
from caduceus.run_directory import Checkpoint, RunDirectory


@dataclass
class Progress:
    """Where a run stands. `loader` is the loader's own state: {fingerprint, seed, samples_consumed}."""

    step: int
    tokens: int
    loader: dict[str, Any]
    wandb_id: str | None = None


def save_checkpoint(
    run: RunDirectory, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Checkpoint:
    """Write checkpoints/step-…; it counts only once all of it is on disk."""
    writing = run.checkpoints_path / f".writing-{progress.step:08d}"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir()
        dcp.save(_state(model, optimizer), checkpoint_id=writing, no_dist=True)
        torch.save(_rng_state(), writing / "rng.pt")
        write_atomically(writing / "progress.json", dump_json(asdict(progress)))
        return run.complete_checkpoint(writing, progress.step, {"samples": progress.loader["samples_consumed"]})
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise UserError(
            f"{run.checkpoints_path}: the checkpoint of step {progress.step} could not be written ({error.strerror}); "
            "earlier checkpoints are untouched: make room and start the same command again"
        ) from error


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore model, optimizer and RNG states in place."""
    state = _state(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=checkpoint.path, no_dist=True)
    except dcp.CheckpointException as error:
        raise UserError(f"{checkpoint.path}: the checkpoint of another model ({_first_line(error)})") from None
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    _set_rng_state(torch.load(checkpoint.path / "rng.pt", weights_only=False))
    return Progress(**json.loads((checkpoint.path / "progress.json").read_text()))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _rng_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
