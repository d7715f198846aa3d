"""Whatever is wrong with W&B, real training has the same losses, ends well, and W&B has every row afterwards."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from caduceus.monitor.rows import Monitor
from caduceus.monitor.wandb.history import merged, wandb_row
from caduceus.monitor.wandb.process import WandbProcess, sync
from caduceus.run.directory import RunDirectory
from caduceus.train.stopping import EXIT_REQUEUE
from caduceus.train.trainer import train
from tests.monitor.conftest import children_of, lasting, sent_rows, status, wait_for
from tests.monitor.wandb_server import KEY, WandbServer
from tests.train.conftest import SmallRun, numbers

pytestmark = pytest.mark.slow

STEPS, STOP, HEAL, FAIL_AGAIN = 20, 7, 10, 15
"""The first start is stopped, the second begins with the fault, sees it go, and meets it again in mid-run."""
MOST_SECONDS = 90.0
"""What all of W&B's failing may cost a run."""


@dataclass
class World:
    """What a fault acts on."""

    server: WandbServer
    run: Path
    environment: pytest.MonkeyPatch
    config: Any
    broken: bool = False


@dataclass(frozen=True)
class Fault:
    """A way of failing; `brings(world, broken)` begins or ends it, `says` is what a warning must hold."""

    name: str
    brings: Callable[[World, bool], None]
    says: str
    heals: bool = True
    """Whether it can come and go while a trainer runs."""


def answering(fault: str | int) -> Callable[[World, bool], None]:
    return lambda world, broken: world.server.fail(fault if broken else None)


def unresolved(world: World, broken: bool) -> None:
    world.environment.setenv("WANDB_BASE_URL", "http://wandb.invalid" if broken else world.server.url)


def short_key(world: World, broken: bool) -> None:
    world.environment.setenv("WANDB_API_KEY", "short" if broken else KEY)


def no_key(world: World, broken: bool) -> None:
    world.config.wandb.mode = "online"
    world.environment.setenv("WANDB_API_KEY", "" if broken else KEY)
    world.environment.setenv("NETRC", os.devnull)


def kill_clients(world: World, broken: bool) -> None:
    """From now on each client is killed as soon as a step sees it."""
    world.broken = broken


def full_disk(world: World, broken: bool) -> None:
    """The disk of RUN/wandb has no room left."""
    folder = world.run / "wandb"
    if not os.path.ismount(folder):
        RunDirectory.create_or_resume(world.config).release()
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small disk takes root")
    filler = folder / "filler"
    if broken:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return
    filler.unlink(missing_ok=True)


def oversized(world: World, broken: bool) -> None:
    """The configuration is larger than what the server takes in one request."""
    world.server.most_bytes = 200_000
    world.config.wandb.notes = "long " * 100_000
    world.config.wandb.tags = ["tag " * 100]


FAULTS = [
    Fault("no network", unresolved, r"wandb\.invalid cannot be reached", heals=False),
    Fault("401", answering(401), r"refuses the API key \(status 401\)"),
    Fault("403 of the entity", answering("forbidden"), r"permission denied|403"),
    Fault("404 of the entity", answering("no entity"), r"not found|404"),
    Fault("500", answering(500), r"answers with status 500"),
    Fault("429", answering("busy"), r"answers with status 429"),
    Fault("hang", answering("hang"), r"does not answer within 5 s"),
    Fault("refused", answering("refuse"), r"cannot be reached \(.*Connection refused"),
    Fault("reset", answering("reset"), r"breaks off its answer|[Cc]onnection reset"),
    Fault("killed client", kill_clients, r"client was killed while it started|wandb-core exited"),
    Fault("full disk", full_disk, r"No space left"),
    Fault("short key", short_key, r"the API key is not valid", heals=False),
    Fault("no key", no_key, r"not logged in", heals=False),
    Fault("oversized configuration", oversized, r"wandb\.notes.*: too long for W&B", heals=False),
]


@pytest.fixture(scope="module")
def undisturbed(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    small = SmallRun(small_shards, tmp_path_factory.mktemp("undisturbed"))
    config = small.config("run", **sections())
    assert train(config) == 0
    return numbers(config.run.dir)


def sections() -> dict[str, Any]:
    return {"train": {"steps": STEPS, "global_batch": 4, "micro_batch": 4}, "checkpoint": {"every": 100}}


@pytest.fixture
def on_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[Monitor, int], None]]]:
    """What is called after each step's row is written."""
    calls: list[Callable[[Monitor, int], None]] = []
    log_training = Monitor.log_training

    def logged(monitor: Monitor, row: dict[str, Any]) -> None:
        log_training(monitor, row)
        for call in calls:
            call(monitor, row["step"])

    monkeypatch.setattr(Monitor, "log_training", logged)
    yield calls


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_trouble_at_both_starts_and_in_mid_run_costs_no_loss_and_no_row(
    fault: Fault,
    undisturbed: list[dict[str, Any]],
    small_run: SmallRun,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture,
    on_step: list[Callable[[Monitor, int], None]],
) -> None:
    config = small_run.config("run", **sections(), wandb={"mode": "auto"})
    path = Path(config.run.dir)
    world = World(server, path, monkeypatch, config)
    waited = 0.0

    def disturb(monitor: Monitor, step: int) -> None:
        nonlocal waited
        began = time.monotonic()
        if step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == HEAL and fault.heals:
            wait_for(lambda: kill(monitor) and trouble_told(caplog, fault), 60)
            fault.brings(world, False)
            wait_for(lambda: path.joinpath("wandb/status.json").exists() and status(path)["state"] == "online", 60)
        if step == FAIL_AGAIN and fault.heals:
            fault.brings(world, True)
        kill(monitor)
        waited += time.monotonic() - began

    def kill(monitor: Monitor) -> bool:
        if world.broken and monitor.wandb.pid is not None:
            for client in children_of(monitor.wandb.pid, b"wandb-core"):
                os.kill(client, signal.SIGKILL)
        return True

    on_step.append(disturb)
    try:
        fault.brings(world, True)
        began = time.monotonic()
        assert train(config) == EXIT_REQUEUE
        assert train(config) == 0
        assert time.monotonic() - began - waited < MOST_SECONDS
        assert numbers(path) == undisturbed
        assert trouble_told(caplog, fault), warnings_of(caplog)
        warnings = warnings_of(caplog)
        assert all("\n" not in warning for warning in warnings)
        assert fault.brings is no_key or not any("not logged in" in warning for warning in warnings)
        assert fault.brings is oversized or all("launch/runs.py sync" in warning for warning in warnings)
        assert "wandb" not in capfd.readouterr().err  # what the client prints is not for the user
        fault.brings(world, False)
        assert sync(RunDirectory.open(path)) == 0
        run = server.only_run()
        assert sent_rows(run) == [lasting(wandb_row(row)) for row in merged(RunDirectory.open(path).metrics())]
        assert run.written_twice == 0
    finally:
        if os.path.ismount(path / "wandb"):
            subprocess.run(["umount", "-l", str(path / "wandb")], check=True)


def test_the_sender_outlives_a_disk_that_stays_full(
    small_run: SmallRun, server: WandbServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_run.config("run", **sections(), wandb={"mode": "auto"})
    path = Path(config.run.dir)
    world = World(server, path, monkeypatch, config)
    full_disk(world, True)
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    sender = WandbProcess(config, path)
    try:
        wait_for(lambda: "No space left" in caplog.text, 60)
        time.sleep(4)  # past the pause before its next attempt
        assert sender._process.poll() is None
        full_disk(world, False)
        wait_for(lambda: (path / "wandb" / "status.json").exists() and status(path)["state"] == "online", 60)
    finally:
        sender.end(0, False, None)
        subprocess.run(["umount", "-l", str(path / "wandb")], check=True)


def trouble_told(caplog: pytest.LogCaptureFixture, fault: Fault) -> bool:
    return any(re.search(fault.says, warning) for warning in warnings_of(caplog))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of about W&B."""
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [text for text in told if text.startswith("wandb: ")]
