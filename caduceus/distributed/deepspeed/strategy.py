"""DeepSpeed ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) are divided over all ranks; stage 0
divides nothing.

DeepSpeed stores, reduces and offloads. This project keeps what decides the numbers of a run: the optimizer, the
learning rate, clipping, precision and batches.
"""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from caduceus.config import Config
from caduceus.distributed.deepspeed.package import naming_its_file, need_deepspeed
from caduceus.distributed.deepspeed.settings import engine_settings
from caduceus.distributed.initialisation import initialise
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import DEEPSPEED_FOLDER as FOLDER
from caduceus.distributed.strategy import BuildOptimizer, Part, Strategy, set_learning_rate
from caduceus.errors import UserError
from caduceus.files import dump_json
from caduceus.hub.folders import WEIGHTS
from caduceus.patience import is_file

_LAYOUT = "layout.json"
_POLL_SECONDS = 0.2


class DeepSpeed(Strategy):
    """A DeepSpeed engine around the model, driven by the project's loop."""

    can_stage = False

    def __init__(self, config: Config, ranks: Ranks, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        block = max(_count(block) for block in model.blocks)
        settings = engine_settings(config, ranks.data_world, _count(model), block)
        deepspeed = need_deepspeed(ranks.device.type)
        # It uses LOCAL_RANK as the device, even where a rank sees only its own GPU, and again in steps of stage 3.
        if ranks.device.index is not None:
            os.environ["LOCAL_RANK"] = str(ranks.device.index)
        self.ranks = ranks
        self.zero_stage = config.parallel.zero_stage
        file = config.parallel.deepspeed_config
        if self.zero_stage == 3:
            partition = naming_its_file(file)(functools.partial(deepspeed.zero.Init, config_dict_or_path=settings))
            initialise(model, config.train, ranks.device, shard=lambda part: partition(module=part))
            self._whole = deepspeed.zero.GatheredParameters
        else:
            initialise(model, config.train, ranks.device)
            self._whole = contextlib.nullcontext
        optimizer = build_optimizer(model, config.train)
        with naming_its_file(file):
            self.model, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self.optimizer = self.model.optimizer

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages over ranks, but the shares of the loss must be added up.
        self.model.backward(loss * self.ranks.world, scale_wrt_gas=False)

    def clip(self, clip_norm: float) -> torch.Tensor:
        gradients = self._local_gradients()
        square = nn.utils.get_total_norm(gradients).to(self.ranks.device).square()
        norm = (square if self.zero_stage == 0 else self.ranks.sum(square)).sqrt()  # in stage 0 all have all gradients
        if clip_norm:
            for gradient in gradients:
                gradient.mul_(torch.clamp(clip_norm / (norm + 1e-6), max=1).to(gradient.device))
        return norm

    def step(self, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)
        self.model.step()

    def parts(self) -> list[Part]:
        """Empty in stage 3, and without gradients in 1 and 2: DeepSpeed divides these without regard to the borders of
        parameters.
        """
        if self.zero_stage == 3:
            return []
        parts = super().parts()
        return parts if self.zero_stage == 0 else [part._replace(gradient=None) for part in parts]

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Whole weights; those of a sharded model are gathered one at a time."""
        weights = {}
        for name, parameter in self.model.module.named_parameters():
            with self._whole(parameter):
                weights[name] = parameter.detach().clone()
        return weights

    def discard_gradients(self) -> None:
        if self.zero_stage == 0:
            self.model.zero_grad()
            return
        # ZeRO drops a step whose norm is not finite, together with all that it keeps of the gradients.
        gradients = self._local_gradients()
        # For gradients in host memory it computed the norms in the backward pass, and looks only at these.
        for tensor in [*gradients, *getattr(self.optimizer, "norm_for_param_grads", {}).values()]:
            tensor.fill_(float("nan"))
        if gradients:
            self.model.step()

    def save(self, directory: Path, group: dist.ProcessGroup | None = None) -> None:
        with self._agreeing_on_files():
            self.model.save_checkpoint(directory, tag=FOLDER, save_latest=False)
        weights = self._gather_weights()
        if self.ranks.is_main:
            save_file(weights, directory / WEIGHTS)
            (directory / FOLDER / _LAYOUT).write_bytes(dump_json({"stage": self.zero_stage, "world": self.ranks.world}))

    @contextlib.contextmanager
    def _agreeing_on_files(self) -> Iterator[None]:
        """A context for a save of DeepSpeed, which ends in barriers: a rank whose file fails must reach them as well.

        The barriers become those of `Ranks`, which wait for slow files longer than a collective of training may take.
        """
        from deepspeed import comm

        writer, failures = self.model.checkpoint_engine, []
        write, barrier = writer.save, comm.barrier

        def attempt(*arguments: Any, **options: Any) -> Any:
            try:
                return write(*arguments, **options)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        writer.save, comm.barrier = attempt, lambda *_, **__: self.ranks.barrier()
        try:
            yield
        finally:
            writer.save, comm.barrier = write, barrier
        self.ranks.raise_together(failures[0] if failures else None)

    def load(self, directory: Path) -> None:
        if not is_file(directory / FOLDER / _LAYOUT):
            raise UserError(
                f"{directory}: a checkpoint of single, ddp or fsdp, which deepspeed cannot read; go on with one of "
                "these strategies"
            )
        layout = json.loads((directory / FOLDER / _LAYOUT).read_text())
        before, now = layout["stage"], self.zero_stage
        if before == now and (now == 0 or layout["world"] == self.ranks.world):
            self._load_folder(directory)
        elif before == now or {before, now} == {1, 2}:
            self._load_universal(directory)
        else:
            raise UserError(
                f"{directory}: a checkpoint of ZeRO stage {before}, which DeepSpeed cannot turn into stage {now}; "
                f"go on with parallel.zero_stage={before}"
            )

    def _load_universal(self, directory: Path) -> None:
        """Load a checkpoint of another number of ranks, or of stage 1 as stage 2, through DeepSpeed's universal
        checkpoint.
        """
        universal = directory.with_name(f".writing-universal-{directory.name}")  # removed later if a kill leaves it
        self._convert(directory / FOLDER, universal / FOLDER)
        self.model._config.load_universal_checkpoint = True
        try:
            self._load_folder(universal)
        finally:
            self.model._config.load_universal_checkpoint = False
        self.ranks.barrier()
        if self.ranks.is_main:
            shutil.rmtree(universal)

    def _load_folder(self, directory: Path) -> None:
        # From a universal checkpoint, stage 3 gives all groups the settings of the first one, including weight decay,
        # and all parameters the same object as their count of steps, which each of them would then increase.
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        path, _ = self.model.load_checkpoint(directory, tag=FOLDER, load_lr_scheduler_states=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed finds no checkpoint in {directory}")
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        for state in self.model.basic_optimizer.state.values():
            state["step"] = state["step"].clone()

    def _convert(self, source: Path, target: Path) -> None:
        """Run DeepSpeed's own conversion in a separate process; the other ranks exchange messages meanwhile, so that no
        wait times out.
        """
        process = None
        if self.ranks.is_main:
            shutil.rmtree(target.parent, ignore_errors=True)
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
            command += ["--input_folder", str(source), "--output_folder", str(target), "--inject_missing_state"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while self.ranks.maximum(process is not None and process.poll() is None):
            time.sleep(_POLL_SECONDS)
        failure = None
        if process is not None and process.returncode != 0:
            lines = process.stdout.read().strip().splitlines()
            failure = UserError(f"{source}: DeepSpeed could not convert it to {self.ranks.world} ranks ({lines[-1]})")
        self.ranks.raise_together(failure)

    def _local_gradients(self) -> list[torch.Tensor]:
        """This rank's part of the reduced gradients, in the tensors that DeepSpeed keeps until its step; they may be
        changed.
        """
        optimizer = self.optimizer
        if self.zero_stage == 0:
            return [parameter.grad for parameter in self.model.module.parameters() if parameter.grad is not None]
        if getattr(optimizer, "cpu_offload", False):
            flat = optimizer.single_partition_of_fp32_groups
            return [part.grad for part in flat if part.grad is not None]
        if getattr(optimizer, "offload_optimizer", False):
            return [part.grad for part in optimizer.fp32_partitioned_groups_flat if part.grad is not None]
        return [gradient for group in optimizer.averaged_gradients.values() for gradient in group or ()]

    def _gather_weights(self) -> dict[str, torch.Tensor]:
        """All weights on the main rank, none on the others; those of a sharded model are gathered one at a time."""
        weights = {}
        for name, parameter in self.model.module.named_parameters():
            with self._whole(parameter):
                if self.ranks.is_main:
                    weights[name] = parameter.detach().cpu().clone()
        return weights


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
