"""Layouts of a run over ranks, and a way to train under many of them in one set of processes, and to look inside."""

import contextlib
import gc
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from caduceus.config import Config, config_from_dict
from caduceus.data.loader import Batch, TrainLoader
from caduceus.distributed.strategy import Strategy
from caduceus.errors import ONE_LINE
from caduceus.train import loop, setup, trainer
from tests.distributed.ranks import on_ranks
from tests.distributed.recorder import Recorder


@dataclass(frozen=True)
class Layout:
    """An arrangement of `world` ranks: keys of `parallel.`, apart from the name."""

    name: str
    world: int
    parallel: dict[str, Any]

    @property
    def data_world(self) -> int:
        return self.world // (self.parallel.get("context", 1) * self.parallel.get("strands", 1))

    @property
    def computes_fp64(self) -> bool:
        return self.parallel["strategy"] != "deepspeed"


LAYOUTS = [
    Layout("single", 1, {"strategy": "single"}),
    Layout("DDP 2", 2, {"strategy": "ddp"}),
    Layout("FSDP 2", 2, {"strategy": "fsdp"}),
    Layout("ZeRO 0, 2 ranks", 2, {"strategy": "deepspeed", "zero_stage": 0}),
    Layout("ZeRO 1, 2 ranks", 2, {"strategy": "deepspeed", "zero_stage": 1}),
    Layout("ZeRO 2, 2 ranks", 2, {"strategy": "deepspeed", "zero_stage": 2}),
    Layout("ZeRO 3, 2 ranks", 2, {"strategy": "deepspeed", "zero_stage": 3}),
    Layout("context 2", 2, {"strategy": "ddp", "context": 2}),
    Layout("strands 2", 2, {"strategy": "ddp", "strands": 2}),
    Layout("DDP 4", 4, {"strategy": "ddp"}),
    Layout("FSDP 2 x 2 hybrid", 4, {"strategy": "fsdp", "shard": 2}),
    Layout("context 4", 4, {"strategy": "ddp", "context": 4}),
    Layout("DDP 2 x context 2", 4, {"strategy": "ddp", "context": 2}),
    Layout("FSDP 2 x context 2", 4, {"strategy": "fsdp", "context": 2}),
    Layout("ZeRO 1, 2 x context 2", 4, {"strategy": "deepspeed", "zero_stage": 1, "context": 2}),
    Layout("ZeRO 2, 2 x context 2", 4, {"strategy": "deepspeed", "zero_stage": 2, "context": 2}),
    Layout("ZeRO 3, 2 x context 2", 4, {"strategy": "deepspeed", "zero_stage": 3, "context": 2}),
    Layout("FSDP 2 x 2 hybrid, strands 2 x context 2", 4, {"strategy": "fsdp", "shard": 2, "strands": 2, "context": 2}),
    Layout("ZeRO 2, 2 x strands 2", 4, {"strategy": "deepspeed", "zero_stage": 2, "strands": 2}),
]


@dataclass
class Observed:
    """What a rank saw of a training: its gradients of the first step (whole), samples, seconds, and bytes."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)
    """The samples of this rank, in the order in which it took them."""
    seconds_to_first_step: float = 0.0
    refusal: str | None = None
    """The message of the error that ended it, if it was one that a line explains."""
    bytes_held: int = 0
    """Bytes of parameters, buffers and optimizer state, after the second step."""
    bytes_sent: int = 0
    """Given to collectives in the second step."""


def config_of(layout: Layout, shards: Path, directory: Path, accumulation: int = 1, **train: Any) -> Config:
    """A small Caduceus-PS run of 30 steps; a global batch of 8 sequences, whatever the layout. `train`: its keys."""
    values = {
        "model": {"d_model": 8, "n_layer": 2, "d_state": 4, "rcps": True},
        "data": {"path": str(shards), "seq_len": 64, "workers": 0},
        "train": {
            "steps": 30,
            "global_batch": 8,
            "micro_batch": 8 // (layout.data_world * accumulation),
            "warmup_steps": 1,
            **train,
        },
        "valid": {"every": 0},
        "checkpoint": {"every": 1000},
        "parallel": layout.parallel,
        "run": {"dir": str(directory), "name": directory.name, "device": "cpu"},
        "wandb": {"mode": "disabled"},
        "monitor": {"report": False, "windows": 0, "machine_seconds": 0.0},
    }
    return config_from_dict(values)


def train_all(world: int, configs: list[Config], weighed: Collection[str] = ()) -> list[list[Observed]]:
    """Trainings one after another in `world` processes; what was observed, by run and rank.

    The bytes of runs whose names are `weighed` are counted, which takes a while.
    """
    if world == 1:
        return [[observed] for observed in _train_here(0, configs, weighed)]
    return list(zip(*on_ranks(world, _train_here, configs, weighed), strict=True))


def _train_here(rank: int, configs: list[Config], weighed: Collection[str]) -> list[Observed]:
    return [_train_observed(config, config.run.name in weighed) for config in configs]


def _train_observed(config: Config, weigh: bool) -> Observed:
    observed = Observed()
    with pytest.MonkeyPatch.context() as patch, _recording_samples(observed):
        build = setup.build_strategy
        started, before = time.monotonic(), _tensor_bytes() if weigh else 0

        def build_observed(*arguments: Any) -> Strategy:
            strategy = build(*arguments)
            clip, step = strategy.clip, strategy.step
            steps = 0

            def observed_clip(clip_norm: float) -> Tensor:
                if not observed.gradients:
                    observed.gradients = whole_gradients(strategy)
                return clip(clip_norm)

            def observed_step(lr: float) -> None:
                nonlocal steps
                step(lr)
                steps += 1
                if steps == 1:
                    observed.seconds_to_first_step = time.monotonic() - started
                if steps == 2 and weigh:
                    own = sum(gradient.nbytes for gradient in observed.gradients.values())
                    observed.bytes_held = _tensor_bytes() - before - own

            strategy.clip, strategy.step = observed_clip, observed_step
            return strategy

        patch.setattr(setup, "build_strategy", build_observed)
        if weigh:
            patch.setattr(loop, "training_step", _recorded(loop.training_step, observed))
        # It collects all garbage at the start, which would take most of the time of short trainings.
        patch.setattr(trainer, "scheduled_garbage_collection", contextlib.nullcontext)
        try:
            assert trainer.train(config) == 0
        except ONE_LINE as error:
            observed.refusal = str(error)
    return observed


def _recorded(step: Callable[..., Any], observed: Observed) -> Callable[..., Any]:
    steps = 0

    def recorded(*arguments: Any, **handed: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps != 2:
            return step(*arguments, **handed)
        with Recorder() as recorder:
            row = step(*arguments, **handed)
        observed.bytes_sent = sum(recorder.bytes().values())
        return row

    return recorded


@contextlib.contextmanager
def _recording_samples(observed: Observed) -> Iterator[None]:
    iterate = TrainLoader.__iter__

    def passing_by(loader: TrainLoader) -> Iterator[Batch]:
        for batch in iterate(loader):
            observed.samples += batch.g.tolist()
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoader, "__iter__", passing_by)
        yield


def whole_gradients(strategy: Strategy) -> dict[str, Tensor]:
    """The reduced gradients of all parameters between the last backward pass of a step and the update."""
    model = getattr(strategy.model, "module", strategy.model)
    if type(strategy).__name__ != "DeepSpeed":
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in gradients.items()}
    from deepspeed.utils import safe_get_full_grad

    if strategy.zero_stage == 0:
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {name: safe_get_full_grad(parameter).clone() for name, parameter in model.named_parameters()}


def _tensor_bytes() -> int:
    """Bytes of memory that tensors of this process hold."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.device.type != "meta"]
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
