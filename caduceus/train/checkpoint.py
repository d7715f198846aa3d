"""Checkpoints: model and optimizer through torch.distributed.checkpoint, the rest as JSON and RNG states.

The sharded files carry names that do not depend on the layout, so a checkpoint resumes on any number of ranks.
"""

import json
import random
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from caduceus.data.shards import dump_json, write_atomically
from caduceus.distributed.strategy import Single
from caduceus.errors import UserError
from caduceus.run_directory import Checkpoint, RunDirectory


@dataclass
class Progress:
    """Where a run stands. `loader` is the loader's own state: {fingerprint, seed, samples_consumed}."""

    step: int
    tokens: int
    loader: dict[str, Any]
    wandb_id: str | None = None


def save_checkpoint(run: RunDirectory, progress: Progress, strategy: Single) -> None:
    """Write checkpoints/step-… together with the other ranks; it counts only once all of it is on disk."""
    ranks = strategy.ranks
    writing = run.checkpoints_path / f".writing-{progress.step:08d}"
    if ranks.is_main:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
    ranks.barrier()
    try:
        strategy.save(writing)
        if ranks.is_main:
            torch.save(_rng_state(), writing / "rng.pt")
            write_atomically(writing / "progress.json", dump_json(asdict(progress)))
            run.complete_checkpoint(writing, progress.step, {"samples": progress.loader["samples_consumed"]})
        failure = None
    except (OSError, dcp.CheckpointException) as error:
        shutil.rmtree(writing, ignore_errors=True)
        failure = UserError(
            f"{run.checkpoints_path}: the checkpoint of step {progress.step} could not be written "
            f"({_last_line(error)}); earlier checkpoints are untouched: make room and start the same command again"
        )
    ranks.raise_together(failure)


def load_checkpoint(checkpoint: Checkpoint, strategy: Single) -> Progress:
    """Restore model, optimizer and RNG states in place, on any number of ranks."""
    try:
        strategy.load(checkpoint.path)
    except (dcp.CheckpointException, RuntimeError, ValueError) as error:
        raise UserError(f"{checkpoint.path}: not a checkpoint of this model ({_last_line(error)})") from None
    _set_rng_state(torch.load(checkpoint.path / "rng.pt", weights_only=False))
    return Progress(**json.loads((checkpoint.path / "progress.json").read_text()))


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


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
