"""The interface of strategies for the trainer, with the behaviour of a single process."""

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from caduceus.config import Config, TrainConfig
from caduceus.distributed.initialisation import initialise
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.patience import is_directory, patiently, system_error

DEEPSPEED_FOLDER = "deepspeed"
"""The folder of DeepSpeed's own files in its checkpoints."""


BuildOptimizer = Callable[[nn.Module, TrainConfig], torch.optim.Optimizer]
"""A function that makes the optimizer of a model, which may be on the meta device."""


class Part(NamedTuple):
    """A rank's part of a parameter and of its gradient."""

    name: str
    weight: torch.Tensor
    gradient: torch.Tensor | None


class Strategy:
    """A model on the ranks of a run, and its optimizer.

    The base class does what one process does. Strategies override how the model is wrapped and how gradients are
    exchanged. The loop calls `model`. The loss given to `backward` is this rank's share of the global loss: shares add
    up over ranks, and so do gradients.
    """

    can_stage = True
    """Whether `stage` is available, so that training goes on while a checkpoint is written."""

    def __init__(self, config: Config, ranks: Ranks, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        self.ranks = ranks
        self.model = self.wrap(config, model)
        self.optimizer = build_optimizer(model, config.train)

    def wrap(self, config: Config, model: nn.Module) -> nn.Module:
        """Give the model, made on the meta device, its first weights. Returns the module that the loop calls."""
        initialise(model, config.train, self.ranks.device)
        return model

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """A context for both passes of a micro-batch: ranks exchange gradients only in the last one of a step."""
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self, clip_norm: float) -> torch.Tensor:
        """Scale the gradients to a global norm of at most `clip_norm` (0: leave them). Returns the norm before that."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm or float("inf"))

    def step(self, lr: float) -> None:
        """Update the parameters at learning rate `lr` and clear the gradients."""
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.discard_gradients()

    @property
    def network(self) -> nn.Module:
        """The model itself, without wrappers."""
        return getattr(self.model, "module", self.model)

    @property
    def copies(self) -> int:
        """Number of ranks that hold the same part of each parameter."""
        return self.ranks.world

    def parts(self) -> list[Part]:
        """This rank's part of each parameter, and, between the backward pass and the step, of its gradient."""
        return [
            Part(name, local(parameter.detach()), None if parameter.grad is None else local(parameter.grad))
            for name, parameter in self.network.named_parameters()
        ]

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Yield a copy of every whole parameter with its name, on every rank's device. All ranks call it together."""
        return {name: parameter.detach().clone() for name, parameter in self.network.named_parameters()}

    def discard_gradients(self) -> None:
        """Clear the gradients, instead of `step`, where the step is skipped."""
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def writers(self) -> int:
        """Number of ranks, from the first on, that together hold one copy of model and optimizer, and write it."""
        return 1

    def save(self, directory: Path, group: dist.ProcessGroup | None) -> None:
        """Write model and optimizer into `directory`. `group`: that of the `writers`, where there are several.

        Every rank calls it. It returns on the first rank when everything is written, on others when their part is.
        """
        if self.ranks.rank < self.writers:
            self._write(self.state_dict(), directory, group)

    def stage(self, group: dist.ProcessGroup | None) -> Callable[[Path], None]:
        """Copy this rank's part to host memory. Returns a function like `save`, which writes the copy.

        Every rank calls that function, in any thread; the writers communicate over `group`, which nothing else may use
        meanwhile.
        """
        if self.ranks.rank >= self.writers:
            return lambda directory: None
        state = BlockingAsyncStager().stage(self.state_dict())
        return lambda directory: self._write(state, directory, group)

    def _write(self, state: dict[str, Any], directory: Path, group: dist.ProcessGroup | None) -> None:
        # torch's own checksums would take a fifth of the CPU time, and the sha256 of the whole files is a better check.
        torch.serialization.set_crc32_options(False)
        patiently(lambda: os.listdir(directory), is_there=True)  # noqa: PTH208 (the first rank has made it)
        writer = _Writer(directory)
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=self.writers == 1)

    def load(self, directory: Path) -> None:
        """Restore model and optimizer in place from a complete checkpoint, all ranks together.

        Raises `RuntimeError` or `ValueError` for a checkpoint of another model.
        """
        if is_directory(directory / DEEPSPEED_FOLDER):
            raise UserError(
                f"{directory}: a checkpoint of deepspeed, which single, ddp and fsdp cannot read; go on with "
                "parallel.strategy=deepspeed"
            )
        state = self.state_dict()
        with self.ranks.agreeing():  # each rank reads its own part, and none plans for the others
            _read(state, directory)
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer under names that do not depend on the strategy, for torch.distributed.checkpoint."""
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Single(Strategy):
    """One process with a whole model."""


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)


def _read(state: dict[str, Any], directory: Path) -> None:
    def read() -> None:
        try:
            dcp.load(state, storage_reader=_Reader(directory), no_dist=True)
        except dcp.CheckpointException as error:  # it is not an Exception
            causes = [system_error(failure) for failure, _ in error.failures.values()]
            raise next(filter(None, causes), RuntimeError(str(error))) from error

    try:
        patiently(read, is_there=True)
    except OSError as error:
        raise RuntimeError(str(error)) from error


class _Reader(dcp.FileSystemReader):
    """Reads the metadata with `patiently`, as torch hides why reading it failed."""

    def read_metadata(self, *arguments: Any, **named: Any) -> Metadata:
        read = functools.partial(super().read_metadata, *arguments, **named)
        return patiently(read, is_there=not (arguments or named))  # with arguments, it looks for a file of the rank


class _Writer(dcp.FileSystemWriter):
    """Raises the system's own error where a disk is full or broken; torch would hide it behind an error about its
    format.
    """

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return patiently(functools.partial(super().prepare_local_plan, plan))  # it looks for what it would replace

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        try:
            return patiently(functools.partial(super().write_data, plan, planner))
        except RuntimeError as error:
            raise system_error(error) or error from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        patiently(functools.partial(super().finish, metadata, results))
