"""Ranks that are not of one run are told so before they wait for each other."""

import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from caduceus.config import Config, save_config
from caduceus.distributed import rendezvous
from caduceus.distributed.rendezvous import Member, code_and_config_hash, joined, refuse_strangers
from caduceus.errors import ONE_LINE, Kind, NodeError, PeerError, UserError
from tests.distributed.layouts import Layout, config_of
from tests.distributed.ranks import on_ranks, start_ranks

HERE = Member(host="node1", code="c" * 64, configuration="s" * 64, device="cuda")
PAIR = Layout("pair", 2, {"strategy": "ddp"})


def refusals(*members: Member) -> list[UserError | PeerError | None]:
    found = []
    for rank in range(len(members)):
        try:
            refuse_strangers(list(members), rank)
            found.append(None)
        except ONE_LINE as error:
            found.append(error)
    return found


def test_ranks_of_one_run_are_not_refused() -> None:
    on_cpu = replace(HERE, host="node2", device="cpu")
    assert refusals(HERE, replace(HERE, host="node2")) == [None, None]
    assert refusals(on_cpu, on_cpu) == [None, None]


@pytest.mark.parametrize(("field", "told"), [("code", "caduceus code"), ("configuration", "configuration")])
def test_the_rank_that_differs_is_named_on_all(field: str, told: str) -> None:
    other = replace(HERE, host="node2", device="cpu", **{field: "d" * 64})
    for refusal in refusals(HERE, HERE, other):
        assert (type(refusal), refusal.rank, refusal.status) == (PeerError, 2, 2), "either may be the wrong one"
        assert str(refusal).startswith(f"rank 2 on node2: its {told} (dddddddddddd) differs from that of node1 (")


@pytest.mark.parametrize(
    "blind", [replace(HERE, host="node2", device="cpu"), replace(HERE, host="node2", device=None, problem="no GPU")]
)
def test_a_node_without_the_gpu_of_the_others_is_at_fault(blind: Member) -> None:
    first, second = refusals(HERE, blind)
    assert type(first) is PeerError and type(second) is NodeError
    assert (first.rank, first.peer_kind) == (1, Kind.NODE)
    assert str(first) == str(second)
    assert str(first).startswith("rank 1 on node2: torch sees no GPU there, but other ranks have one")


def test_where_no_rank_has_a_gpu_asking_for_one_is_the_users_mistake() -> None:
    blind = replace(HERE, device=None, problem="run.device: cuda was asked for")
    assert [(type(refusal), str(refusal)) for refusal in refusals(blind, blind)] == [
        (UserError, "run.device: cuda was asked for")
    ] * 2


def test_a_problem_of_one_rank_is_told_with_its_place() -> None:
    told = "parallel.deepspeed_config: ds.json is not readable"
    first, second = refusals(HERE, replace(HERE, problem=told))
    assert str(first) == str(second) == f"rank 1 on node1: {told}"
    assert (type(first), first.rank, first.peer_kind, type(second)) == (PeerError, 1, Kind.USER, UserError)


def test_ranks_that_do_not_all_come_are_told_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "MEETING", timedelta(seconds=2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    met = rf"^rank 0 on .*: not all 2 ranks met at 127\.0\.0\.1:{port} within 0:00:02 \("
    with pytest.raises(PeerError, match=met), joined(config_of(PAIR, tmp_path, tmp_path / "run")):
        pass


def test_ranks_without_an_address_to_meet_at_are_told_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR expected"), joined(config_of(PAIR, tmp_path, tmp_path / "run")):
        pass


def test_a_file_of_deepspeeds_counts_as_configuration(tmp_path: Path) -> None:
    config = config_of(PAIR, tmp_path, tmp_path / "run")
    config.parallel.deepspeed_config = str(tmp_path / "ds.json")
    hashes = []
    for content in (None, "{}", '{"a": 1}', "{}"):
        if content is not None:
            (tmp_path / "ds.json").write_text(content)
        hashes.append(code_and_config_hash(config)[1])
    assert hashes[1] == hashes[3] and len(set(hashes[1:])) == 2


@pytest.mark.moderate
def test_the_configuration_counts_to_the_last_key(tmp_path: Path) -> None:
    config, other = (config_of(PAIR, tmp_path, tmp_path / "run") for _ in range(2))
    assert code_and_config_hash(config) == code_and_config_hash(other)
    other.train.lr *= 1.0001
    assert code_and_config_hash(config)[0] == code_and_config_hash(other)[0]
    assert code_and_config_hash(config)[1] != code_and_config_hash(other)[1]


@pytest.mark.slow
def test_real_ranks_with_two_layouts_end_with_one_line(small_shards: Path, tmp_path: Path) -> None:
    configs = [config_of(PAIR, small_shards, tmp_path / "run") for _ in range(2)]
    configs[1].parallel.context = 2
    commands = []
    for rank, config in enumerate(configs):
        save_config(config, tmp_path / f"{rank}.yaml")
        commands.append([sys.executable, "-m", "caduceus.train", "--config", tmp_path / f"{rank}.yaml"])
    processes = start_ranks(commands, stderr=subprocess.PIPE)
    told = f"error: rank 1 on {socket.gethostname()}: its configuration ("
    for process in processes:
        message = process.communicate(timeout=300)[1]
        assert process.returncode == 2, message
        assert message.startswith(told) and len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_so_do_ranks_that_had_joined_already(small_shards: Path, tmp_path: Path) -> None:
    configs = [config_of(PAIR, small_shards, tmp_path / "run") for _ in range(2)]
    configs[1].model.d_model = 16
    for message in on_ranks(2, refusal_of_its_own, configs):
        assert message.startswith(f"rank 1 on {socket.gethostname()}: its configuration (")


def refusal_of_its_own(rank: int, configs: list[Config]) -> str:
    from caduceus.train import trainer

    with pytest.raises(PeerError) as refusal:
        trainer.train(configs[rank])
    return str(refusal.value)
