"""What nodes and GPUs do comes into rows of the main rank, from every node."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from caduceus.config import Config
from caduceus.distributed.ranks import Ranks
from caduceus.monitor.wandb.history import merged, wandb_row
from caduceus.run import machine
from caduceus.run.directory import RunDirectory
from caduceus.run.machine import OF_GPUS, OF_NODES, Machine
from caduceus.train import machines, trainer
from caduceus.train.machines import Machines, _nodes
from caduceus.train.trainer import train
from tests.distributed.ranks import on_ranks
from tests.train.conftest import SmallRun

HOST = socket.gethostname().partition(".")[0]


def train_on_a_node_of_its_own(rank: int, config: Config) -> int:
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # as a launcher tells the first rank of a node
    return train(config)


@pytest.mark.slow
def test_two_nodes_come_together_in_the_rows_of_the_first(small_run: SmallRun) -> None:
    keys = {"train": {"steps": 6}, "valid": {"every": 3}, "monitor": {"machine_seconds": 1e-3}}
    config = small_run.config("run", **keys)
    assert on_ranks(2, train_on_a_node_of_its_own, config) == [0, 0]
    rows = RunDirectory(config.run.dir).metrics()
    told = [row for row in rows if "loss" not in row and "valid_loss" not in row]
    assert [row["step"] for row in told] == [1, 2, 3, 4, 5, 6]
    known = {name for name, value in zip(OF_NODES, Machine(Path()).read(), strict=True) if value == value}
    nodes = {f"{HOST}-0", f"{HOST}-1"}
    assert {"cpu_percent", "memory_percent", "disk_percent"} <= known
    for row in told:
        assert row.keys() == {"step", *(f"{name}/{node}" for name in known for node in nodes)}
        for node in nodes:
            assert 0 <= row[f"cpu_percent/{node}"] <= 100
            assert row[f"memory_percent/{node}"] == pytest.approx(psutil.virtual_memory().percent, abs=25)
    of_step = [wandb_row(row) for row in merged(rows)]
    assert len(of_step) == 6 and all(f"hardware/cpu_percent/{HOST}-1" in row for row in of_step)


@pytest.mark.moderate
def test_ranks_of_a_node_are_told_apart_as_the_launcher_has_it(small_run: SmallRun, monkeypatch) -> None:
    """Also under DeepSpeed, to which LOCAL_RANK is the number of the rank's GPU: 0 for all that see but their own."""
    set_up, told = trainer.set_up, []

    def with_another_local_rank(*arguments: Any) -> Any:
        monkeypatch.setenv("LOCAL_RANK", "0")
        return set_up(*arguments)

    def noted(config: Config, ranks: Ranks) -> Machines:
        told.append(os.environ["LOCAL_RANK"])
        return Machines(config, ranks)

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(trainer, "set_up", with_another_local_rank)
    monkeypatch.setattr(trainer, "Machines", noted)
    assert train(small_run.config("run", train={"steps": 1}, valid={"every": 0})) == 0
    assert told == ["3"]


def test_nodes_have_their_hosts_names_and_numbers_where_these_recur() -> None:
    assert _nodes([("a", 0), ("a", 1), ("b", 0), ("b", 1)]) == ["a", "a", "b", "b"]
    assert _nodes([("a", 0), ("a", 1), ("b", 0), ("a", 0)]) == ["a-0", "a-0", "b", "a-2"]
    assert _nodes([("a", 0)]) == ["a"]


@pytest.mark.moderate
def test_readings_are_those_of_the_machine(tmp_path: Path) -> None:
    reader = Machine(tmp_path / "not" / "there")
    size, began, used = 64 << 20, time.monotonic(), time.process_time()
    with (tmp_path / "file").open("wb") as file:
        file.write(os.urandom(size))
        os.fsync(file.fileno())
    while time.monotonic() - began < 0.3:  # a processor that is busy
        pass
    before = psutil.disk_usage(str(tmp_path)).percent
    readings = dict(zip(OF_NODES, reader.read(), strict=True))
    seconds, used = time.monotonic() - began, time.process_time() - used
    assert readings["disk_percent"] == pytest.approx(before, abs=1)
    # Ticks of 10 ms, of which this process alone had so many; others may have had more.
    assert 100 * (used - 0.05) / seconds / psutil.cpu_count() < readings["cpu_percent"] <= 100
    if tmp_path.stat().st_dev in {Path(part.mountpoint).stat().st_dev for part in psutil.disk_partitions()}:
        assert readings["disk_write_bytes_per_second"] * seconds >= 0.9 * size


def test_the_network_counts_cards_once_and_remote_memory_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = psutil.net_io_counters(pernic=True)["lo"]._replace(bytes_recv=100, bytes_sent=10)
    found = {"lo": counted, "eth0": counted, "eth1": counted, "bond0": counted}
    monkeypatch.setattr(machine.psutil, "net_io_counters", lambda pernic: found)
    monkeypatch.setattr(machine, "_INTERFACES", tmp_path / "net")
    monkeypatch.setattr(machine, "_ADAPTERS", tmp_path / "infiniband")
    assert machine._counters()[2:] == [300, 30]  # none is known to be a card: all but the loopback
    for card in ("eth0", "eth1"):
        (tmp_path / "net" / card / "device").mkdir(parents=True)
    assert machine._counters()[2:] == [200, 20]
    counters = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1" / "counters"
    counters.mkdir(parents=True)
    (counters / "port_rcv_data").write_text("7\n")
    (counters / "port_xmit_data").write_text("5\n")
    assert machine._counters()[2:] == [200 + 28, 20 + 20]


def test_what_a_gpu_does_not_tell_is_left_out(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own readings of a card stand in for one, as one of them fails; a machine without the library has none."""
    config = small_run.config("run", monitor={"machine_seconds": 1e-3})
    together = Machines(config, Ranks(0, 1, 1, torch.device("cpu")))
    assert not {key.partition("/")[0] for key in together.row(1)} & set(OF_GPUS)

    def forbidden(device: torch.device) -> int:
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 4 << 30))
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 412_000)
    monkeypatch.setattr(torch.cuda, "temperature", forbidden)
    told = dict(zip(OF_GPUS, machines._gpu(torch.device("cuda", 0)), strict=True))
    celsius = told.pop("gpu_celsius")
    assert told == {"gpu_percent": 97, "gpu_memory_percent": 75, "gpu_watts": 412} and celsius != celsius


def test_it_is_told_now_and_then_or_never(small_run: SmallRun) -> None:
    alone = Ranks(0, 1, 1, torch.device("cpu"))
    never = Machines(small_run.config("never", monitor={"machine_seconds": 0.0}), alone)
    assert not never.are_due
    seldom = Machines(small_run.config("seldom", monitor={"machine_seconds": 0.2}), alone)
    assert not seldom.are_due
    time.sleep(0.25)
    assert seldom.are_due
    seldom.row(1)
    assert not seldom.are_due
