"""What a node may have wrong is told in a line that names it."""

import contextlib
import shutil
import socket
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from caduceus.config import Config
from caduceus.distributed.ranks import Ranks
from caduceus.errors import ONE_LINE, Kind, UserError, kind_of
from caduceus.ops import cpu
from caduceus.train import preflight, trainer
from tests.distributed.ranks import on_ranks
from tests.train.conftest import SmallRun

Usage = namedtuple("Usage", "total used free")
HOST = socket.gethostname()


@pytest.mark.parametrize(("full", "told"), [("run", "a checkpoint takes"), ("/dev/shm", "loader workers need")])
def test_a_full_disk_is_told_before_the_first_step(small_run: SmallRun, monkeypatch, full: str, told: str) -> None:
    config = small_run.config("run", data={"workers": 2})
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0) if full in str(path) else usage(path))
    with pytest.raises(UserError, match=f"rank 0 on {HOST}: .*{full}.*0 bytes free.*{told}"):
        trainer.train(config)


@pytest.mark.moderate
def test_without_workers_shared_memory_does_not_matter(small_run: SmallRun, monkeypatch) -> None:
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0) if "shm" in str(path) else usage(path))
    assert trainer.train(small_run.config("run", data={"workers": 0}, train={"steps": 1})) == 0


def test_a_backend_that_cannot_run_the_model_is_told_before_shards_are_opened(small_run: SmallRun, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    nowhere = {"path": "/nowhere"}
    with pytest.raises(UserError, match=r"^ops\.backend: 'triton' needs an NVIDIA GPU, not 'cpu'"):
        trainer.train(small_run.config("run", ops={"backend": "triton"}, data=nowhere))
    monkeypatch.setattr(cpu, "SUPPORTED", {"d_state": range(1, 3)}, raising=False)
    with pytest.raises(UserError, match=r"^model\.d_state: ops\.backend 'cpu' takes 1 to 2, got 3"):
        trainer.train(small_run.config("run", ops={"backend": "cpu"}, model={"d_state": 3}, data=nowhere))


@pytest.mark.slow
def test_a_rank_whose_clock_is_wrong_is_named_on_all_ranks(small_run: SmallRun) -> None:
    sections = {"train": {"steps": 1, "global_batch": 4, "micro_batch": 2}, "valid": {"every": 0}}
    ends = on_ranks(2, train_beside_one_whose_clock_is_wrong, small_run.config("run", **sections))
    assert [kind for kind, _ in ends] == [Kind.PEER, Kind.NODE]
    for _, message in ends:
        assert message.startswith(f"rank 1 on {HOST}: its clock differs by +3600 s"), message


def train_beside_one_whose_clock_is_wrong(rank: int, config: Config) -> tuple[Kind, str]:
    now = time.time
    with pytest.MonkeyPatch.context() as patched, pytest.raises(ONE_LINE) as refusal:
        patched.setattr(time, "time", lambda: now() + 3600 * rank)
        trainer.train(config)
    return kind_of(refusal.value), str(refusal.value)


@pytest.mark.parametrize(("peak", "refused"), [(50, False), (70, True)])
def test_memory_is_compared_with_what_a_rank_can_have_of_its_gpu(monkeypatch, peak: int, refused: bool) -> None:
    """The GPU has 80 GiB, of which 20 belong to others: NCCL, the driver, another process."""
    gib = 2**30
    stubs = {
        "mem_get_info": lambda device: (30 * gib, 80 * gib),
        "memory_reserved": lambda device: 30 * gib,
        "memory_allocated": lambda device: 10 * gib,
        "max_memory_allocated": lambda device: peak * gib,
        "reset_peak_memory_stats": lambda device: None,
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(preflight, "run_micro_batch", lambda config, strategy: None)
    monkeypatch.setattr(preflight.memory, "moment_bytes_to_come", lambda config, strategy: 0)
    strategy = SimpleNamespace(ranks=Ranks(0, 1, 1, torch.device("cuda", 0)))
    with pytest.raises(UserError, match=r"of the 60\.0 GiB of its GPU") if refused else contextlib.nullcontext():
        preflight.check_gpu_memory(Config(), strategy)
