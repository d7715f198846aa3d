"""The page on watching names what rows, events and W&B's configuration hold: all of it, and nothing else."""

import re
from pathlib import Path

import pytest

from caduceus.monitor.wandb.facts import facts_of
from caduceus.run.directory import RunDirectory
from caduceus.run.events import KINDS
from caduceus.run.machine import OF_GPUS
from caduceus.train import machines, roofline
from caduceus.train.trainer import train
from tests.conftest import REPOSITORY
from tests.train.conftest import SmallRun

PAGE = (REPOSITORY / "docs" / "watching.md").read_text()
ROWS = PAGE[PAGE.index("## What rows hold") : PAGE.index("## In the terminal")]
_SPAN = re.compile(r"`([^`]+)`")
_NAME = re.compile(r"[a-z][a-z0-9_.]*[a-z0-9](/[A-Za-z-]+)?")


def entries(text: str) -> set[str]:
    """What the first column of the text's tables names, less what follows a slash."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name.partition("/")[0] for cell in cells for name in _SPAN.findall(cell)}


def named(text: str) -> set[str]:
    return {name.partition("/")[0] for name in _SPAN.findall(text) if _NAME.fullmatch(name)}


@pytest.fixture(scope="module")
def run(two_species: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that has all a run can have; the numbers of a GPU, which may be absent here, are made up."""
    stage = {"steps": 3, "global_batch": 4, "micro_batch": 4, "lr": 1e-3}
    config = SmallRun(two_species, tmp_path_factory.mktemp("watching")).config(
        "run",
        model={"d_model": 8, "n_layer": 1, "d_state": 2},
        train={"steps": 6, "ema": 0.9, "stages": [{**stage, "seq_len": 64}, {**stage, "seq_len": 128}]},
        valid={"every": 2},
        monitor={"every": 2, "machine_seconds": 1e-3},
        evaluations={"more": {"verb": "heldout", "every": 2}},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "_peaks", lambda device: next(iter(roofline.PEAKS.values())))
        patch.setattr(machines, "_gpu", lambda device: [1.0] * len(OF_GPUS))
        assert train(config) == 0
    return RunDirectory.open(config.run.dir)


@pytest.mark.moderate
def test_it_names_every_entry_of_every_row(run: RunDirectory) -> None:
    found = {key.partition("/")[0] for row in run.metrics() for key in row}
    assert found - {"eval"} <= named(ROWS)
    assert {"eval/NAME/…", "eval/NAME/seconds"} <= set(_SPAN.findall(ROWS))
    of_gpus = {name for name in OF_GPUS if name in named(ROWS)}
    told = {key for row in run.metrics() for key in row}
    assert of_gpus == set(OF_GPUS) and entries(ROWS) <= found, entries(ROWS) - found
    assert {"loss", "valid_loss", "valid_accuracy", "epoch"} <= {key.partition("/")[0] for key in told if "/" in key}


def test_it_names_every_kind_of_event() -> None:
    start = ROWS.index("`RUN/events.jsonl`")
    events = re.findall(r"`([a-z ]+)`", re.sub(r"\s+", " ", ROWS[start:]))
    assert set(events) == set(KINDS)


def test_it_names_what_wandbs_configuration_tells_of_a_start(run: RunDirectory) -> None:
    facts, _ = facts_of(run, run.config())
    shown = {name.removeprefix("start.") for name in entries(PAGE) if name.startswith("start.")}
    assert shown == set(facts["start"])
