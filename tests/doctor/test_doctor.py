"""What the doctor finds on a machine, alone and with others, and the page that tells it."""

import errno
import os
import resource
import socket
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from caduceus.distributed.ranks import Ranks
from caduceus.doctor import __main__ as doctor
from caduceus.doctor import collectives, device, node
from caduceus.doctor.findings import Finding, State, page
from tests.distributed.ranks import on_ranks

Usage = namedtuple("Usage", "total used free")
CPU = torch.device("cpu")


def test_a_machine_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    status = doctor.examine(tmp_path / "runs", "cpu")
    told = capsys.readouterr().out
    for what in ("GPUs", "open files", "locked memory", "shared memory", "network", "processors", "files", "kernels"):
        assert any(line[8:].startswith(f"{what} ") for line in told.splitlines()), what
    assert "cpu: as the definition" in told
    assert status == int("0 wrong" not in told)
    assert list((tmp_path / "runs").iterdir()) == [], "nothing is left behind"


def test_the_page_begins_with_what_is_wrong_and_tells_a_thing_of_several_nodes_once() -> None:
    fine, bad = Finding("clocks", State.OK, "within 0.1 s"), Finding("files", State.WRONG, "no space", "make room")
    told = page([("n1", [fine]), ("n2", [bad, fine]), ("n3", [fine])])
    lines = told.splitlines()
    assert lines[0] == "3 ranks on 3 nodes: n1, n2, n3"
    assert lines[2:5] == [
        "wrong   files           n2: no space",
        "                        -> make room",
        "ok      clocks          within 0.1 s",
    ]
    assert lines[-1] == "1 wrong, 0 to look at, 1 well"


def test_limits_that_hundreds_of_ranks_exceed_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    assert node.open_files(8).state is State.OK
    few = node.open_files(512)
    assert few.state is State.LOOK and "nofile" in few.remedy and "up to 2,057" in few.told
    monkeypatch.setattr(node, "_INFINIBAND", tmp_path)
    assert node.locked_memory().state is State.OK
    (tmp_path / "mlx5_0").mkdir()
    assert node.locked_memory().state is State.LOOK and "mlx5_0" in node.locked_memory().told


def test_small_and_failing_disks_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1, 1, 2**20))
    assert node.shared_memory().state is State.LOOK and "--shm-size" in node.shared_memory().remedy
    assert node.temporary_files().state is State.LOOK
    monkeypatch.setattr(node, "_write", lambda path, size: 0.5)
    slow = node.files(tmp_path)
    assert slow.state is State.LOOK and "a small file in 500.0 ms" in slow.told

    def full(path: Path, size: int) -> float:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node, "_write", full)
    assert node.files(tmp_path) == Finding(
        "files", State.WRONG, f"{tmp_path}: No space left on device", "choose another --folder, or mend the disk"
    )


def test_a_name_that_leads_nowhere_matters_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "own_address_towards", lambda host: "127.0.1.1")
    monkeypatch.setattr(os, "environ", {})
    assert node.network().state is State.OK
    monkeypatch.setattr(os, "environ", {"SLURM_NNODES": "2"})
    assert node.network().state is State.LOOK and "GLOO_SOCKET_IFNAME" in node.network().remedy
    monkeypatch.setattr(os, "environ", {"SLURM_NNODES": "2", "GLOO_SOCKET_IFNAME": "ib0"})
    assert node.network().state is State.OK


def test_gpus_are_told_with_their_software_and_who_else_uses_them(monkeypatch, tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC\n")
    monkeypatch.setattr(node, "_DRIVER", driver)
    blind = node.gpus()
    assert blind.state is State.WRONG and "torch sees no GPU" in blind.told
    stubs = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda number: "NVIDIA H100 80GB HBM3",
        "mem_get_info": lambda number: (79 - 20 * number, 80),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 27, 3))
    found = node.gpus()
    assert found.state is State.LOOK and "nvidia-smi" in found.remedy
    assert "2 x NVIDIA H100 80GB HBM3; driver 550.54.15" in found.told and "NCCL 2.27.3" in found.told
    assert found.told.endswith("in use already: 1")


@pytest.mark.moderate
def test_kernels_that_compute_wrongly_or_not_at_all_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = device._scan
    assert device.kernels(CPU).state is State.OK
    monkeypatch.setattr(device, "_scan", lambda name, on: [1.1 * t if name == "cpu" else t for t in scan(name, on)])
    assert device.kernels(CPU).state is State.WRONG and "differs by 1.0e-01" in device.kernels(CPU).told

    def broken(name: str, on: torch.device) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(device, "_scan", broken)
    assert "RuntimeError: no C compiler" in device.kernels(CPU).told


def four_ranks_on_two_nodes(rank: int) -> tuple[list[tuple[str, list[Finding]]], int]:
    """As if the last two were on another node, whose clock is a minute ahead."""
    names = ("n1", "n1", "n2", "n2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "node_name", lambda: names[rank])
        patch.setattr(doctor.time, "time", lambda: 60.0 * (rank // 2))
        patch.setattr(collectives, "_between", lambda local_ranks: 1e15)
        return doctor._together(Ranks(rank, 4, 1, CPU), [Finding("here", State.OK, names[rank])])


@pytest.mark.slow
def test_ranks_look_at_clocks_and_rates_together() -> None:
    by_rank = on_ranks(4, four_ranks_on_two_nodes)[0]
    assert [name for name, _ in by_rank] == ["n1", "n1", "n2", "n2"]
    first = by_rank[0][1]
    clocks = next(finding for finding in first if finding.what == "clocks")
    assert clocks == Finding("clocks", State.LOOK, "within 60.0 s of one another", "set the clocks (NTP)")
    rates = [finding for finding in first if finding.what == "exchange"]
    assert [rate.told.split(":")[0] for rate in rates] == [
        "in a node, 2 ranks",
        "between nodes, 2 ranks",
        "all ranks, 4 ranks",
    ]
    assert [rate.state for rate in rates] == [State.OK, State.LOOK, State.OK], "far below what the links should give"


def test_ranks_that_do_not_meet_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from datetime import timedelta

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(doctor, "MEETING", timedelta(seconds=1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(doctor.NodeError, match=rf"rank 0 on .*: the 2 ranks do not meet at 127\.0\.0\.1:{port} \("):
        doctor._join(CPU, 0, 2)
