"""The work of a start: open the run and its data, decide every `auto`, build the model, resume, check."""

import copy
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from caduceus.config import Config, Stage, refuse_cuda_graphs, stages_of, within
from caduceus.data.loader import TrainLoader, ValidationLoader, build_loader, build_validation
from caduceus.data.samples import resolve_strands
from caduceus.data.split_sources import open_sources, read_manifests, using_manifests
from caduceus.devices import GPU, is_gpu
from caduceus.distributed.build import build_model, build_strategy, choose_strategy
from caduceus.distributed.initialisation import starting_weights
from caduceus.distributed.layout import Sharing, check_layout, with_sharing
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.files import write_atomically
from caduceus.model.costs import parameter_count
from caduceus.ops.backends import resolve_backend
from caduceus.run.directory import RunDirectory
from caduceus.train.branching import branch_point
from caduceus.train.checkpointing import Checkpoints
from caduceus.train.optimizer import build_optimizer
from caduceus.train.preflight import check_before_start, check_gpu_memory, check_model, refuse_other_data
from caduceus.train.progress import Progress
from caduceus.train.recomputation import keep_states_to_fit, recompute_to_fit

if TYPE_CHECKING:
    from caduceus.evaluate.in_loop import InLoop

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """The value that a key of the configuration takes in this start."""

    key: str
    asked: Any
    takes: Any
    because: str


@dataclass
class Resolved:
    """A configuration with every `auto` decided, and the decisions."""

    config: Config
    decisions: list[Decision] = field(default_factory=list)

    def decide(self, key: str, asked: Any, takes: Any, because: str) -> None:
        """Record the value that a key takes, for the table and resolved.yaml."""
        self.decisions.append(Decision(key, asked, takes, because))

    def table(self) -> str:
        """The decisions, one per line, in columns."""
        rows = [("key", "asked", "takes", "because")]
        rows += [(row.key, _word(row.asked), _word(row.takes), row.because) for row in self.decisions]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ("  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def to_yaml(self) -> str:
        """The decisions as sections of keys, each with `asked`, `takes` and `because`."""
        sections: dict[str, dict[str, Any]] = {}
        for row in self.decisions:
            section, _, name = row.key.partition(".")
            told = {"asked": row.asked, "takes": row.takes, "because": row.because}
            sections.setdefault(section, {})[name] = told
        return OmegaConf.to_yaml(OmegaConf.create(sections))


@dataclass(frozen=True)
class Opened:
    """The run directory, which the main rank holds; this rank's part of the data; and the evaluations to run."""

    run: RunDirectory
    loader: TrainLoader
    validation: ValidationLoader | None
    evaluations: "list[InLoop]"


@dataclass(frozen=True)
class Setup:
    """What a start has built, ready for the first step. In `config` every `auto` is decided."""

    config: Config
    strategy: Strategy
    checkpoints: Checkpoints
    progress: Progress


def open_run(stage: Stage, ranks: Ranks) -> Opened:
    """Open data and run directory on all ranks together.

    `stage`: the stage that begins or goes on; the stages after it are checked as well. Raises `UserError`, before
    anything is written, for what cannot be trained.
    """
    config = stage.run
    run = RunDirectory(config.run.dir)
    with ranks.agreeing():
        check_model(config, ranks.device)
        _refuse_graphs(stage.config, ranks, Sharing(ranks.strands, ranks.context))
    manifests = _manifests(stage.config, ranks)
    with ranks.agreeing(), using_manifests(manifests):
        evaluations = _evaluations(config)
        loader, validation = _build_loaders(stage.config, ranks)
        for later in stages_of(config)[stage.number :]:
            _refuse_stage(later, ranks)
        if ranks.is_main:
            if config.train.decay_from is not None and not run.checkpoints():
                branch_point(config)
            if config.train.init_from is not None and not run.checkpoints():
                starting_weights(config.train.init_from, config.model)
            _check_evaluations(evaluations, config)
            run = RunDirectory.create_or_resume(config)
    refuse_other_data(loader, ranks)
    return Opened(run, loader, validation, evaluations)


def _evaluations(config: Config) -> "list[InLoop]":
    if not config.evaluations:
        return []
    from caduceus.evaluate.in_loop import evaluations_in  # it imports every verb, and most runs have no evaluations

    return evaluations_in(config)


def _check_evaluations(evaluations: "list[InLoop]", config: Config) -> None:
    if evaluations:
        from caduceus.evaluate.in_loop import check_evaluations

        check_evaluations(evaluations, config.checkpoint.best)


def open_stage(opened: Opened, stage: Stage, ranks: Ranks) -> Opened:
    """The same run, with the data opened for a further stage."""
    manifests = _manifests(stage.config, ranks)
    with ranks.agreeing(), using_manifests(manifests):
        loader, validation = _build_loaders(stage.config, ranks)
    return replace(opened, loader=loader, validation=validation)


def _manifests(config: Config, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """The manifests, which the main rank reads for all ranks."""
    found: dict[str, dict[str, Any]] = {}
    with ranks.agreeing():
        if ranks.is_main and config.data.mode == "shards":
            found = read_manifests(config.data)
    return ranks.broadcast(found)


def _build_loaders(config: Config, ranks: Ranks) -> tuple[TrainLoader, ValidationLoader | None]:
    part = {
        "rank": ranks.data_rank,
        "world": ranks.data_world,
        "positions": ranks.positions(config.data.seq_len),
        "device": ranks.device,
    }
    peers = ranks.largest_of_peers if ranks.shares_samples else None
    loader = build_loader(config, "train", **part, largest_of_peers=peers)
    return loader, build_validation(config, **part) if config.valid.every else None


def _refuse_graphs(config: Config, ranks: Ranks, sharing: Sharing) -> None:
    """Raise `UserError` where CUDA graphs are asked for, but do not go with the device or the sharing of samples."""
    arranged = with_sharing(config, sharing)
    arranged.run = replace(config.run, device=ranks.device.type)
    refuse_cuda_graphs(arranged)


def _refuse_stage(stage: Stage, ranks: Ranks) -> None:
    """Raise `UserError` now where a later stage would be refused when it begins."""
    with within(stage):
        _refuse_graphs(stage.config, ranks, check_layout(stage.config, ranks.world))
        if stage.config.data.mode == "shards":
            open_sources(stage.config.data, "train")
            if stage.config.valid.every:
                open_sources(stage.config.data, "valid")


def set_up(stage: Stage, ranks: Ranks, opened: Opened, started: float | None = None) -> Setup:
    """Decide every `auto` of a stage, in the same way on all ranks; build the strategy, resume, and check.

    The decisions are logged as one table and written to RUN/resolved.yaml. `started`: monotonic time of the start; None
    where the process goes on from the stage before.
    """
    run, loader, config = opened.run, opened.loader, stage.config
    resolved = _resolve(config, ranks)
    _forget_first_weights(resolved.config, run, ranks)
    strategy = build_strategy(resolved.config, ranks, build_optimizer)
    checkpoints = Checkpoints(stage.run, run, strategy, stage)
    progress = _resume(config, run, loader, checkpoints)
    check_before_start(resolved.config, run, strategy, checkpoints.group)
    if config.train.activation_checkpointing == "auto":
        whole, inputs = recompute_to_fit(resolved.config, strategy)
        words = f"{whole} of {config.model.n_layer} blocks whole, and what feeds the scan of {inputs} others"
        resolved.decide("train.activation_checkpointing", "auto", words, "as few as the free memory requires")
    if config.train.keep_states != "none":
        words = f"{keep_states_to_fit(resolved.config, strategy)} of {config.model.n_layer} blocks"
        because = "what the free memory allows" if config.train.keep_states == "auto" else "where the backend can"
        resolved.decide("train.keep_states", config.train.keep_states, words, because)
    _tell_schedule(resolved, config, progress)
    check_gpu_memory(resolved.config, strategy)
    gpus = _gpus(ranks)
    with ranks.agreeing(), run.telling_of_disks():
        if ranks.is_main:
            if config.train.stages:
                _log.info("%s", _told_stage(stage, progress))
            _log.info("%s", resolved.table())
            run.keep_config(stage.run)
            write_atomically(run.resolved_path, resolved.to_yaml().encode())
            run.truncate_metrics(progress.step)
            facts = {"step": progress.step, "data_fingerprint": loader.fingerprint, **_layout(config, ranks, gpus)}
            if config.train.stages:
                run.note_stage(stage.number, {**facts, "step": progress.steps_before})
            if started is not None:
                run.write_provenance({**facts, "startup_seconds": time.monotonic() - started})
    return Setup(resolved.config, strategy, checkpoints, progress)


def _gpus(ranks: Ranks) -> dict[str, int]:
    """The names of all ranks' GPUs, and how many ranks compute on one of that name."""
    name = torch.cuda.get_device_name(ranks.device) if is_gpu(ranks.device) else None
    return dict(Counter(filter(None, ranks.gather_objects(name))))


def _layout(config: Config, ranks: Ranks, gpus: dict[str, int]) -> dict[str, Any]:
    """The size of the model and the machines of the run. in_job: the launcher started it."""
    return {
        "parameters": parameter_count(config.model),
        "ranks": ranks.world,
        "nodes": ranks.world // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world)),
        "gpus": gpus,
        "in_job": "SUBMITIT_EXECUTOR" in os.environ,
        "strands": ranks.strands,
        "context": ranks.context,
    }


def _forget_first_weights(config: Config, run: RunDirectory, ranks: Ranks) -> None:
    """Clear `train.init_from` where the run goes on from a checkpoint: these weights may be gone by now."""
    if config.train.init_from is None:
        return
    resumes = None
    with ranks.agreeing(), run.telling_of_disks():
        if ranks.is_main:
            resumes = run.newest_valid_checkpoint() is not None
    if ranks.broadcast(resumes):
        config.train.init_from = None


def _resolve(config: Config, ranks: Ranks) -> Resolved:
    """Decide every `auto`, null or 0 that follows from the configuration and the ranks alone."""
    resolved = Resolved(copy.deepcopy(config))
    now, device = resolved.config, ranks.device.type
    if config.run.device == "auto":
        now.run.device = device
        resolved.decide("run.device", "auto", device, "there is a GPU" if device == GPU else "torch sees no GPU")
    if config.ops.backend == "auto":
        dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
        now.ops.backend = resolve_backend("auto", ranks.device, dtype)
        resolved.decide("ops.backend", "auto", now.ops.backend, f"the fastest on {device}")
    if config.train.cuda_graphs == "auto":
        now.train.cuda_graphs = "none"
        if device == GPU:  # on a CPU there is nothing to decide
            resolved.decide("train.cuda_graphs", "auto", "none", "the gain has not been measured on a GPU")
    if config.data.strands == "auto":
        now.data.strands = resolve_strands(config)
        seen = "both strands by itself" if config.model.rcps else "one strand at a time"
        resolved.decide("data.strands", "auto", now.data.strands, f"the model sees {seen}")
    for name, takes in (("strands", ranks.strands), ("context", ranks.context)):
        if getattr(config.parallel, name) != takes:
            asked = getattr(config.parallel, name)
            setattr(now.parallel, name, takes)
            because = f"splits a batch of {config.train.global_batch:,} over {ranks.world} ranks"
            resolved.decide(f"parallel.{name}", asked, takes, because)
    if config.parallel.strategy == "auto":
        because = choose_strategy(now.parallel, build_model(now, ranks.strand_group), ranks.world)
        resolved.decide("parallel.strategy", "auto", now.parallel.strategy, because)
        if now.parallel.shard != config.parallel.shard:
            resolved.decide("parallel.shard", config.parallel.shard, now.parallel.shard, "the ranks of a node")
    return resolved


def _tell_schedule(resolved: Resolved, config: Config, progress: Progress) -> None:
    train, because = config.train, "kept from the start of the run"
    if progress.step_of_stage == 0:
        because = "a tenth of train.steps" if train.warmup_tokens is None else "train.warmup_tokens"
    if train.warmup_steps is None or train.warmup_steps != progress.warmup_steps:
        resolved.decide("train.warmup_steps", train.warmup_steps, progress.warmup_steps, because)
    if progress.decay_start is not None and train.decay_steps != train.steps - progress.decay_start:
        because = f"the learning rate falls after step {progress.steps_before + progress.decay_start}"
        resolved.decide("train.decay_steps", train.decay_steps, train.steps - progress.decay_start, because)


def _resume(config: Config, run: RunDirectory, loader: TrainLoader, checkpoints: Checkpoints) -> Progress:
    started = time.monotonic()
    progress, what = checkpoints.resume(loader), f"resuming {run.path}"
    if progress is None and config.train.decay_from is not None:
        progress = checkpoints.branch(loader)
        what = f"{run.path} begins from {config.train.decay_from}"
    if progress is None:
        return Progress.first(config, loader)
    _log.info(
        "%s after step %d (%d samples), loaded in %.1f s",
        *(what, progress.step, progress.samples, time.monotonic() - started),
    )
    return progress


def _told_stage(stage: Stage, progress: Progress) -> str:
    train, all_stages = stage.config.train, len(stage.run.train.stages)
    return (
        f"stage {stage.number} of {all_stages}: steps {progress.steps_before + 1} to "
        f"{progress.steps_before + train.steps}, each of {train.global_batch} sequences of {stage.config.data.seq_len}"
    )


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
