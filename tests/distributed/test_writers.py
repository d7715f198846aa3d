"""Who writes a checkpoint: the ranks of one copy, so that what the first rank does for it does not grow with copies."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner

from caduceus.config import Config
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import BlockingAsyncStager
from caduceus.run.directory import RunDirectory
from caduceus.train.checkpointing import Checkpoints, load_checkpoint
from caduceus.train.optimizer import build_optimizer
from caduceus.train.progress import Progress
from tests.distributed.layouts import Layout, config_of
from tests.distributed.ranks import on_ranks
from tests.distributed.test_guards import whole_parameters

LAYOUTS = {
    "ddp": ({"strategy": "ddp"}, [True, False, False, False]),
    "hybrid": ({"strategy": "fsdp", "shard": 2}, [True, True, False, False]),
    "fsdp": ({"strategy": "fsdp"}, [True, True, True, True]),
}
"""Keys of `parallel.`, and which of four ranks write."""


def counting(counts: list[int], patch: pytest.MonkeyPatch) -> None:
    """Appends the items that this rank plans to write, and 0 for a copy to host memory."""
    plan, stage = DefaultSavePlanner.create_local_plan, BlockingAsyncStager.stage

    def counted_plan(planner: DefaultSavePlanner) -> Any:
        made = plan(planner)
        counts.append(len(made.items))
        return made

    def counted_stage(stager: BlockingAsyncStager, state: dict[str, Any]) -> dict[str, Any]:
        counts.append(0)
        return stage(stager, state)

    patch.setattr(DefaultSavePlanner, "create_local_plan", counted_plan)
    patch.setattr(BlockingAsyncStager, "stage", counted_stage)


def save_and_load(rank: int, configs: dict[str, Config]) -> dict[str, tuple[list[int], bool]]:
    """Per configuration what was counted in a save behind the training and one that it waits for, and if it loads."""
    return {name: _save_and_load(rank, config) for name, config in configs.items()}


def _save_and_load(rank: int, config: Config) -> tuple[list[int], bool]:
    ranks, run = Ranks(rank, 4, 1, torch.device("cpu")), RunDirectory(config.run.dir)
    if ranks.is_main:
        RunDirectory.create_or_resume(config).release()
    dist.barrier()
    strategy, counts = build_strategy(config, ranks, build_optimizer), []
    with pytest.MonkeyPatch.context() as patch:
        counting(counts, patch)
        for step, behind in ((1, True), (2, False)):
            config.checkpoint.async_ = behind
            checkpoints = Checkpoints(config, run, strategy)
            checkpoints.save(Progress(step, 0, {"samples_consumed": step}))
            checkpoints.wait()
    before = whole_parameters(strategy)
    with torch.no_grad():
        for parameter in strategy.model.parameters():
            parameter.fill_(0)
    load_checkpoint(run.checkpoints()[-1], strategy)
    after = whole_parameters(strategy)
    return counts, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_one_copy_is_written_by_those_that_hold_it_and_read_by_all(tmp_path: Path) -> None:
    configs = {name: config_of(Layout(name, 4, keys), tmp_path, tmp_path / name) for name, (keys, _) in LAYOUTS.items()}
    for rank, found in enumerate(on_ranks(4, save_and_load, configs)):
        for name, (_, writes) in LAYOUTS.items():
            counts, same = found[name]
            assert same, name
            if not writes[rank]:
                assert counts == [], f"{name}: rank {rank} takes no part in a save"
            else:
                copied, behind, waited = counts
                assert copied == 0 and behind == waited > 0


@pytest.mark.slow
def test_a_save_of_deepspeed_waits_for_slow_files_as_long_as_others(tmp_path: Path) -> None:
    config = config_of(Layout("zero", 2, {"strategy": "deepspeed", "zero_stage": 1}), tmp_path, tmp_path / "run")
    for patient in on_ranks(2, barriers_of_a_save, config, tmp_path):
        assert len(patient) > 1 and all(patient)


def barriers_of_a_save(rank: int, config: Config, directory: Path) -> list[bool]:
    """Whether each barrier in it was one of the group for slow work."""
    ranks, barrier, patient = Ranks(rank, 2, 1, torch.device("cpu")), dist.barrier, []

    def noted(group: dist.ProcessGroup | None = None, **options: Any) -> Any:
        patient.append(group is ranks._patient_group)
        return barrier(group, **options)

    strategy = build_strategy(config, ranks, build_optimizer)
    with pytest.MonkeyPatch.context() as patch, ranks.patiently():
        patch.setattr(dist, "barrier", noted)
        strategy.save(directory, None)
    return patient


def test_the_thread_that_writes_computes_on_the_rank_s_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(Layout("single", 1, {"strategy": "single"}), tmp_path, tmp_path / "run")
    run = RunDirectory.create_or_resume(config)
    strategy, devices = build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer), []
    checkpoints = Checkpoints(config, run, strategy)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    strategy.ranks.device = torch.device("cuda", 3)
    checkpoints.save(Progress(1, 0, {"samples_consumed": 1}))
    checkpoints.wait()
    run.release()
    assert devices == [torch.device("cuda", 3)]
