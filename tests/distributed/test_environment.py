"""What a rank sets before it joins: limits, interfaces, NCCL's records, the number of its device."""

import os
import resource
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from caduceus.config import config_from_dict
from caduceus.distributed import environment, rendezvous
from caduceus.distributed.build import build_strategy
from caduceus.distributed.deepspeed import strategy
from caduceus.distributed.ranks import Ranks
from caduceus.train.optimizer import build_optimizer

ADDRESSES = [("lo", "127.0.0.1"), ("eth0", "10.0.0.7"), ("ib0", "10.9.0.7"), ("eth0", "fd00::7")]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TORCH_", "GLOO_", "NCCL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.parametrize(
    ("world", "limits", "raised", "lazy"),
    [
        (8, (1024, 4096), None, False),
        (512, (1024, 4096), 2057, False),
        (512, (1024, 1024), None, True),
        (2048, (1024, 4096), 4096, True),
        (2048, (1024, resource.RLIM_INFINITY), 6665, False),
        (2048, (resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, False),
    ],
)
def test_descriptors_suffice_for_all_groups_of_gloo(monkeypatch, world, limits, raised, lazy) -> None:
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: asked.append(both))
    environment.allow_descriptors(world)
    assert asked == ([] if raised is None else [(raised, limits[1])])
    assert ("TORCH_GLOO_LAZY_INIT" in os.environ) == lazy


@pytest.mark.parametrize(
    ("routes", "takes"),
    [
        ({"node1": "10.0.0.7"}, "eth0"),
        ({"node1": "10.9.0.7"}, "ib0"),
        ({"node1": "fd00::7"}, "eth0"),
        ({"node1": "127.0.1.1", "192.0.2.1": "10.0.0.7"}, "eth0"),  # as Debian writes the host's own name
        ({"node1": None, "192.0.2.1": None}, None),  # no network
        ({"node1": "10.1.1.1"}, None),
    ],
)
def test_gloo_uses_the_interface_that_leads_to_the_first_node(monkeypatch, routes, takes) -> None:
    monkeypatch.setattr(environment, "own_address_towards", routes.get)
    monkeypatch.setattr(environment, "addresses", lambda: iter(ADDRESSES))
    os.environ.update(MASTER_ADDR="node1", LOCAL_WORLD_SIZE="8")
    environment.choose_interface(8)
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "on one node nothing has to be chosen"
    environment.choose_interface(16)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == takes
    os.environ["GLOO_SOCKET_IFNAME"] = "mine"
    environment.choose_interface(16)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"


def test_the_addresses_of_this_machine_are_found() -> None:
    found = set(environment.addresses())
    assert ("lo", "127.0.0.1") in found
    assert {name for name, _ in found} <= {name for _, name in socket.if_nameindex()}
    assert environment.own_address_towards("127.0.0.1") == "127.0.0.1" and environment.interface_to("127.0.0.1") is None


def test_records_of_collectives_are_kept_and_what_a_user_set_stays(tmp_path: Path) -> None:
    os.environ["TORCH_FR_BUFFER_SIZE"] = "9"
    environment.set_nccl_defaults(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "9"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "nccl-rank")
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ, "torch's own default takes down a hung process better"


@pytest.mark.parametrize(("index", "told"), [(0, "0"), (None, "3")])
def test_deepspeed_takes_the_only_gpu_that_a_rank_sees(monkeypatch, index: int | None, told: str) -> None:
    """The fourth rank of a node, with one visible GPU, which is number 0 there."""
    os.environ["LOCAL_RANK"] = "3"
    seen = []
    engine = SimpleNamespace(optimizer=None)
    library = SimpleNamespace(initialize=lambda **_: (seen.append(os.environ["LOCAL_RANK"]), (engine,))[1])
    monkeypatch.setattr(strategy, "need_deepspeed", lambda device: library)
    keys = {"model": {"d_model": 8, "n_layer": 1}, "parallel": {"strategy": "deepspeed", "zero_stage": 1}}
    build_strategy(config_from_dict(keys), Ranks(0, 1, 1, torch.device("cpu", index)), build_optimizer)
    assert seen == [told]


@pytest.mark.parametrize(
    ("given", "local_ranks", "taken"),
    [
        (range(16), 8, range(8)),  # by torchrun: the half of the processors beside the GPU
        ({0, 1}, 8, None),  # as a scheduler has bound it
        ({8, 9}, 8, None),  # far from it, but nothing better was given
        ({0, 8, 9, 10}, 8, None),  # the one that is near is too little
    ],
)
def test_a_rank_stays_near_its_gpu(monkeypatch, tmp_path: Path, given, local_ranks: int, taken) -> None:
    (tmp_path / "0000:1b:00.0").mkdir()
    (tmp_path / "0000:1b:00.0" / "local_cpulist").write_text("0-3,4-7\n")
    bound = []
    monkeypatch.setattr(environment, "_PCI_DEVICES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(given))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: bound.append(cpus))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    os.environ["LOCAL_WORLD_SIZE"] = str(local_ranks)
    environment.stay_near("0000:1b:00.0")
    environment.stay_near("0000:ff:00.0")
    assert bound == ([] if taken is None else [set(taken)])


@pytest.mark.parametrize(("seen", "name", "warned"), [(8, "H100", 0), (1, "H100", 1), (1, "A100 MIG 1g.5gb", 0)])
def test_ranks_that_cannot_reach_each_other_s_gpus_are_told_of(monkeypatch, caplog, seen, name, warned) -> None:
    facts = SimpleNamespace(pci_domain_id=0, pci_bus_id=27, pci_device_id=0, name=name)
    near = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(rendezvous, "stay_near", near.append)
    os.environ["LOCAL_WORLD_SIZE"] = "8"
    for rank in (0, 1):
        rendezvous._look_at_gpu(torch.device("cuda", 0), rank)
    assert near == ["0000:1b:00.0"] * 2
    assert sum("NCCL may then not copy" in record.message for record in caplog.records) == warned
