"""Every `auto` is decided once, at the start: what the log and resolved.yaml tell is what runs."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from caduceus.config import config_from_dict, config_to_dict
from caduceus.distributed.ranks import Ranks
from caduceus.run.directory import RunDirectory
from caduceus.train import setup
from caduceus.train.trainer import train
from tests.distributed.ranks import on_ranks
from tests.train.conftest import SmallRun, numbers


def resolved_of(directory: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(RunDirectory(directory).resolved_path))


@pytest.mark.moderate
def test_what_was_decided_is_logged_once_as_a_table_and_written_down(small_run: SmallRun, caplog) -> None:
    train_keys = {"steps": 30, "activation_checkpointing": "auto"}
    config = small_run.config("run", model={"n_layer": 2}, train=train_keys, valid={"every": 0})
    config.run.device = "auto"
    with caplog.at_level("INFO"):
        assert train(config) == 0
    found = resolved_of(config.run.dir)
    takes = {f"{section}.{name}": row["takes"] for section, keys in found.items() for name, row in keys.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert takes["run.device"] == device
    assert takes["ops.backend"] == {"cpu": "cpu", "cuda": "triton"}[device]
    assert (takes["data.strands"], takes["parallel.strategy"], takes["train.warmup_steps"]) == ("forward", "single", 3)
    assert takes["train.activation_checkpointing"].startswith("0 of 2 blocks")
    assert all(row["because"] for keys in found.values() for row in keys.values())
    (table,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("key ")]
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(takes)
    assert RunDirectory(config.run.dir).config().parallel.strategy == "auto", "config.yaml is as asked for"


@pytest.mark.moderate
def test_what_is_asked_for_is_not_decided(small_run: SmallRun) -> None:
    config = small_run.config(
        "run",
        train={"steps": 1, "warmup_steps": 0},
        ops={"backend": "naive"},
        data={"strands": "both"},
        parallel={"strategy": "single", "strands": 1, "context": 1},
        valid={"every": 0},
    )
    assert train(config) == 0
    assert resolved_of(config.run.dir) == {}


@pytest.mark.moderate
def test_a_run_with_its_decisions_asked_for_makes_the_same_numbers(small_run: SmallRun) -> None:
    config = small_run.config("asked", train={"steps": 12})
    assert train(config) == 0
    values = config_to_dict(config)
    for section, keys in resolved_of(config.run.dir).items():
        values[section] |= {name: row["takes"] for name, row in keys.items()}
    again = config_from_dict(values)
    again.run.dir = str(Path(config.run.dir).with_name("again"))
    assert train(again) == 0
    assert numbers(again.run.dir) == numbers(config.run.dir)
    assert resolved_of(again.run.dir) == {}


@pytest.mark.moderate
def test_with_more_steps_the_warm_up_stays_and_the_table_says_so(small_run: SmallRun, caplog) -> None:
    config = small_run.config("run", train={"steps": 10}, valid={"every": 0}, checkpoint={"every": 5})
    assert train(config) == 0
    config.train.steps, config.run.allow_change = 100, ["train.steps"]
    config.run.time_budget_minutes = 1e-6
    with caplog.at_level("INFO"):
        train(config)  # a step of which the rate would be in a warm-up of ten
        config.run.allow_change = []
        train(config)  # and one more, when nothing is changed any more
    assert "train.steps: 100 instead of 10; the warm-up stays at the 1 steps" in caplog.text
    rates = [row["lr"] for row in numbers(config.run.dir)]
    assert len(rates) == 12 and rates[1] == 8e-3 and rates[10] > 7e-3 and rates[11] < rates[10]
    told = resolved_of(config.run.dir)["train"]["warmup_steps"]
    assert told == {"asked": None, "takes": 1, "because": "kept from the start of the run"}


@pytest.mark.slow
def test_ranks_decide_the_same(small_run: SmallRun) -> None:
    config = small_run.config(
        "run", train={"steps": 1, "global_batch": 1, "micro_batch": 1}, parallel={"strands": 0}, valid={"every": 0}
    )
    first, second = on_ranks(2, decide, config)
    assert first == second
    assert first["parallel.strands"] == 2 and first["parallel.context"] == 1 and first["parallel.strategy"] == "ddp"


def decide(rank: int, config) -> dict:
    resolved = setup._resolve(config, Ranks(rank, 2, 1, torch.device("cpu"), strands=2))
    return {row.key: row.takes for row in resolved.decisions}


def cards_of(rank: int, names: list[str | None]) -> dict[str, int]:
    ranks = Ranks(rank, len(names), 1, torch.device("cpu"))
    ranks.device = torch.device("cpu" if names[rank] is None else "cuda")  # it meets the others over gloo all the same
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: names[rank])
        return setup._gpus(ranks)


@pytest.mark.moderate
def test_the_cards_of_all_ranks_are_told() -> None:
    told = on_ranks(3, cards_of, ["NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
    assert told == [{"NVIDIA A100-SXM4-80GB": 2, "NVIDIA H100 80GB HBM3": 1}] * 3
    assert on_ranks(2, cards_of, [None, None]) == [{}, {}]
