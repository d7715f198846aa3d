"""The workspace of W&B: made by the real library, of names that runs really have."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from caduceus.errors import UserError
from caduceus.monitor import __main__ as monitor
from caduceus.monitor.wandb.dashboard import layout, make_dashboard
from caduceus.monitor.wandb.history import wandb_row
from caduceus.run.directory import RunDirectory
from caduceus.run.machine import OF_GPUS
from caduceus.train import machines, roofline
from caduceus.train.trainer import train
from tests.monitor.wandb_server import ENTITY, WandbServer
from tests.train.conftest import SmallRun

OF_WANDB = "system/"
"""What W&B's client measures by itself."""


@pytest.fixture(autouse=True)
def fresh_client() -> Iterator[None]:
    """The library keeps a server's address for as long as the process lives."""
    yield
    wandb.teardown()


def names_of_a_run(two_species: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every name in W&B's history of a real run; of a GPU, which may be absent here, the numbers alone are made up."""
    monkeypatch.setattr(roofline, "_peaks", lambda device: next(iter(roofline.PEAKS.values())))
    monkeypatch.setattr(machines, "_gpu", lambda device: [1.0] * len(OF_GPUS))
    small = SmallRun(two_species, directory)
    config = small.config("run", train={"steps": 4}, monitor={"every": 2, "machine_seconds": 1e-3})
    assert train(config) == 0
    return {name for row in RunDirectory.open(config.run.dir).metrics() for name in wandb_row(row)}


@pytest.mark.moderate
def test_it_shows_what_runs_tell(two_species: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_of_a_run(two_species, tmp_path, monkeypatch)
    sections = layout()["sections"]
    assert [section["name"] for section in sections] == ["loss", "species", "speed", "health", "hardware"]
    panels = [panel for section in sections for panel in section["panels"]]
    shown = set()
    for panel in panels:
        assert panel["x"] in ("tokens", "step", "RelativeTime(Wall)")
        if "regex" in panel:
            here = {name for name in names if re.search(panel["regex"], name)}
            assert here, panel
        else:
            here = set(panel["y"])
            assert {name for name in here if not name.startswith(OF_WANDB)} <= names, panel
        shown |= here
    quantiles = r"health/(dt|decay)_p(05|95)/"
    left = {name for name in names - shown if not re.match(quantiles, name)}
    assert {name.partition("/")[0] for name in left} <= {"step", "samples", "tokens", "valid"}
    assert all(re.match("valid/(best|rc_disagreement|accuracy_)", name) for name in left if name.startswith("valid"))


@pytest.mark.moderate
def test_the_command_saves_it(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["monitor", "dashboard", "--entity", ENTITY, "--project", "genomes"])
    assert monitor.main() == 0
    told = capsys.readouterr()
    assert told.out.startswith("http") and "genomes" in told.out and told.err == ""
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, "genomes", "Caduceus")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    wanted = layout()["sections"]
    assert [section["name"] for section in sections[: len(wanted)]] == [section["name"] for section in wanted]
    for made, asked in zip(sections, wanted, strict=False):
        config = [panel["config"] for panel in made["panels"]]
        assert [one["chartTitle"] for one in config] == [panel["title"] for panel in asked["panels"]]
        assert [one.get("metrics") or one["metricRegex"] for one in config] == [
            panel.get("y") or panel["regex"] for panel in asked["panels"]
        ]


def test_what_goes_wrong_is_one_line(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dashboard: strangers/genomes: W&B made no workspace \(.*permission denied"):
        make_dashboard("strangers", "genomes")
    server.fail(401)
    with pytest.raises(UserError, match=r"dashboard: .* refuses the API key"):
        make_dashboard(ENTITY, "genomes")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"dashboard: wandb-workspaces cannot be imported .*pip install"):
        make_dashboard(ENTITY, "genomes")
