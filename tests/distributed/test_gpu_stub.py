"""What each rank tells CUDA and NCCL when it joins, on GPUs that are stubs."""

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from caduceus.distributed import rendezvous
from caduceus.distributed.rendezvous import Member, joined
from tests.distributed.layouts import Layout, config_of

Told = list[tuple[str, Any]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What is asked of CUDA and of torch.distributed, in its order; nothing of it happens."""
    asked: Told = []
    facts = SimpleNamespace(
        pci_domain_id=0, pci_bus_id=1, pci_device_id=0, name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000
    )
    store, member = object(), Member("n", "c", "s", "cuda")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(("set_device", device)))
    monkeypatch.setattr(rendezvous, "meet", lambda mine, rank, world, timeout: (store, [member] * world))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: asked.append(("init", (*a, k))))
    monkeypatch.setattr(dist, "new_group", lambda *a, **k: asked.append(("group", k)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.append(("destroy", None)))
    return asked


def places(rank: int, world: int, visible: int, monkeypatch: pytest.MonkeyPatch) -> None:
    local = min(world, 8)
    names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)


@pytest.mark.parametrize("world", [8, 512])
@pytest.mark.parametrize(("visible", "index"), [(8, lambda rank: rank % 8), (1, lambda rank: 0)])
def test_every_rank_joins_on_its_own_gpu(
    monkeypatch, told: Told, tmp_path: Path, world: int, visible: int, index
) -> None:
    config = config_of(Layout("", 8, {"strategy": "ddp"}), tmp_path, tmp_path / "run", stall_minutes=15)
    config.run.device = "cuda"
    config.train.global_batch, config.train.micro_batch = world, 1
    for rank in {0, 1, 7, world - 1}:
        told.clear()
        places(rank, world, visible, monkeypatch)
        with joined(config) as ranks:
            device = torch.device("cuda", index(rank))
            assert ranks.device == device
        (first, chosen), (second, (backend, options)), *_, last = told
        assert (first, chosen, second, backend) == ("set_device", device, "init", "cpu:gloo,cuda:nccl")
        assert (options["device_id"], options["rank"], options["world_size"]) == (device, rank, world)
        assert options["timeout"] == timedelta(minutes=25)
        assert last == ("destroy", None)
        assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "run" / "logs" / "nccl-rank")


def test_after_a_failure_nothing_is_destroyed_and_the_process_is_to_leave(
    monkeypatch, told: Told, tmp_path: Path
) -> None:
    from caduceus.run import leaving

    monkeypatch.setattr(leaving, "_failure", None)
    monkeypatch.setattr(leaving, "_has_peers", False)
    monkeypatch.setattr(leaving.threading, "Timer", lambda seconds, leave: SimpleNamespace(start=lambda: None))
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    config = config_of(Layout("", 8, {"strategy": "ddp"}), tmp_path, tmp_path / "run")
    config.run.device = "cuda"
    places(3, 8, 8, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError), leaving.leaving(), joined(config):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert left == [1] and ("destroy", None) not in told
